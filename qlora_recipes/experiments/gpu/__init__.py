"""What only a GPU can show, in one command of under ten minutes: eval/on_gpu.py."""
