"""Turn pip's report of what it would install into requirements with hashes: one archive, one line.

python -m pip install --dry-run --ignore-installed --quiet --report - ... | python .ci/hashes.py > hashes.txt
"""

import json
import sys

for entry in sorted(json.load(sys.stdin)["install"], key=lambda entry: entry["metadata"]["name"].lower()):
    archive = entry["download_info"].get("archive_info")
    if archive is not None:  # this package itself is a folder
        metadata = entry["metadata"]
        print(f"{metadata['name']}=={metadata['version']} --hash=sha256:{archive['hashes']['sha256']}")
