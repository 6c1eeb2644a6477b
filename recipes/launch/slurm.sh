#!/usr/bin/env bash
# A recipe on the nodes of a Slurm job, one launcher on each, in a folder that all of them see:
#   sbatch --nodes 2 --gpus-per-node 8 recipes/launch/slurm.sh recipes/llama2_guanaco.py --learning_rate 1e-4
# Before the time limit the run saves its step and the job goes back into the queue, as it does when it is preempted or
# a node is lost. It always gets --resume, which begins at step 1 where there is nothing to resume.
#SBATCH --job-name=qlora-recipes
#SBATCH --ntasks-per-node=1
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
# B: to this script, which passes it on and then knows that it was not an error.
#SBATCH --signal=B:TERM@120
set -u

export CONFIG=${CONFIG:-recipes/launch/ddp.yaml}  # or recipes/launch/fsdp_qlora.yaml
export PROCESSES=$((SLURM_NNODES * ${SLURM_GPUS_ON_NODE:-1}))
export PORT=$((20000 + SLURM_JOB_ID % 20000))
FIRST=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export FIRST

stopped=
trap 'stopped=yes; kill -TERM "$step"' TERM

srun --kill-on-bad-exit=1 bash -c 'exec accelerate launch --config_file "$CONFIG" --num_machines "$SLURM_NNODES" \
  --num_processes "$PROCESSES" --machine_rank "$SLURM_NODEID" --main_process_ip "$FIRST" --main_process_port "$PORT" \
  --rdzv_conf timeout=120 "$@" --resume' node "$@" &
step=$!
wait "$step"
code=$?
if [ "$stopped" ]; then
  wait "$step"  # the first wait ended with the signal
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
