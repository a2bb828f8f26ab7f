#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# A SLURM of two nodes on this machine, by hand, for tests/slurm/run.sh. As root, on Debian with
#   apt-get install slurm-wlm munge
# tests/slurm/start.sh FOLDER [stop]     configuration, state and logs go into FOLDER
# It adds the names of the two nodes to /etc/hosts. No systemd and no cgroups are needed.
set -euo pipefail
folder=$(realpath -m "$1")
export SLURM_CONF="$folder/slurm.conf"

stop() {
  for pid in "$folder"/*.pid; do
    if [[ -e $pid ]]; then kill "$(cat "$pid")" 2>/dev/null || true; fi
  done
}
if [[ ${2:-} == stop ]]; then
  stop
  exit
fi

mkdir -p "$folder"/{state,spool-hubert-node{0,1}} /run/munge
chown munge /run/munge
[[ -S /run/munge/munge.socket.2 ]] || runuser -u munge -- /usr/sbin/munged

grep -q 'hubert-node0' /etc/hosts || echo '127.0.0.1 hubert-node0 hubert-node1' >>/etc/hosts

# Two partitions: a job in `high` takes the node from one in `low`, which has a minute to end and
# is put back into the queue.
cat >"$SLURM_CONF" <<EOF
ClusterName=hubert
SlurmctldHost=$(hostname)(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool-%n
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd-%n.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
ReturnToService=2
SchedulerParameters=sched_interval=5,batch_sched_delay=1,requeue_delay=1,preempt_send_user_signal
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
MinJobAge=3600
NodeName=hubert-node0 NodeHostname=$(hostname) NodeAddr=127.0.0.1 Port=17001 CPUs=1 State=UNKNOWN
NodeName=hubert-node1 NodeHostname=$(hostname) NodeAddr=127.0.0.1 Port=17002 CPUs=1 State=UNKNOWN
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 GraceTime=120 MaxTime=INFINITE State=UP
PartitionName=high Nodes=ALL PriorityTier=10 MaxTime=INFINITE State=UP
EOF
stop
slurmctld
slurmd -N hubert-node0
slurmd -N hubert-node1
sleep 3
sinfo
echo "export SLURM_CONF=$SLURM_CONF"
