# SPDX-License-Identifier: Apache-2.0
"""launch/: the commands that the scripts give, to programs that write them down; the manifests."""

import glob
import os
import pathlib
import re
import subprocess

import kubernetes_validate
import pytest
import yaml

LAUNCH = pathlib.Path(__file__).parents[1] / "launch"
SCRIPTS = sorted(LAUNCH.glob("*.sh"))
MANIFESTS = sorted(LAUNCH.glob("*.yaml"))


@pytest.fixture
def run(tmp_path):
    """run(programs, script, *words, **variables): (exit code, output, calls of the programs).

    `programs` gives the body of each; all they are called with is noted before.
    """

    def run(programs: dict[str, str], script: str, *words: str, **variables: str):
        for name, body in programs.items():
            path = tmp_path / "bin" / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(f'#!/bin/bash\necho "{name} $*" >> {tmp_path}/calls\n{body}\n')
            path.chmod(0o755)
        done = subprocess.run(
            [LAUNCH / script, *words],
            env=os.environ | {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}"} | variables,
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        calls = tmp_path / "calls"
        return (
            done.returncode,
            done.stdout + done.stderr,
            calls.read_text().splitlines() if calls.exists() else [],
        )

    return run


@pytest.mark.parametrize("path", [*SCRIPTS, *MANIFESTS], ids=lambda path: path.name)
def test_each_is_a_page_that_begins_with_its_usage_and_names_nobody(path):
    lines = path.read_text().splitlines()
    assert len(lines) <= 80
    assert any(f"launch/{path.name}" in line for line in lines[:8])
    assert not re.search(r"@[\w-]+\.iam|projects/|gs://\w|BEGIN .*KEY|password", path.read_text())


GCLOUD = 'case "$*" in *describe*) echo "$STATE" ;; esac'


def test_a_pod_is_asked_for_and_waited_for(run):
    words = ("create", "pod", "v5litepod-64", "--spot")
    code, output, calls = run({"gcloud": GCLOUD}, "tpu_pod.sh", *words, STATE="ACTIVE")
    assert code == 0 and "pod: ACTIVE" in output
    assert calls == [
        "gcloud compute tpus queued-resources create pod --node-id=pod"
        " --accelerator-type=v5litepod-64 --runtime-version=v2-alpha-tpuv5-lite --spot",
        "gcloud compute tpus queued-resources describe pod --format=value(state.state)",
    ]


def test_a_pod_that_is_not_granted_is_a_failure(run):
    code, output, _ = run({"gcloud": GCLOUD}, "tpu_pod.sh", "create", "p", "v4-8", STATE="FAILED")
    assert code == 1 and "p: FAILED" in output
    code, output, calls = run({"gcloud": GCLOUD}, "tpu_pod.sh", "create", "p", "h100-8")
    assert code == 1 and "v5litepod-N" in output and not any("h100" in call for call in calls)


def test_a_pod_runs_the_words_as_they_are_on_every_host(run):
    words = ("run", "--config=configs/base.py", "--config.batch.rungs=(1.0, 2.0)")
    code, _, calls = run({"gcloud": ""}, "tpu_pod.sh", "run", "pod", *words)
    assert code == 0
    (ssh, *rest) = "\n".join(calls).splitlines()
    assert ssh.startswith("gcloud compute tpus tpu-vm ssh pod --worker=all --command=")
    command = "\n".join([ssh.split("--command=", 1)[1], *rest])
    hubert = re.search(r"nohup \.venv/bin/(hubert.*?) >>", command)
    assert hubert is not None
    told = subprocess.run(
        ["bash", "-c", f"hubert() {{ printf '%s\\n' \"$@\"; }}; {hubert[1]}"],
        capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    assert told == [*words, "--coordinator=auto"]


@pytest.mark.parametrize(
    ("action", "call"),
    [
        ("log", "tpu-vm ssh pod --worker=0 --command=tail -n 100 -F hubert_jax/hubert.log"),
        ("stop", 'tpu-vm ssh pod --worker=all --command=kill -TERM "$(cat hubert_jax/hubert.pid)"'),
        ("delete", "queued-resources delete pod --force --quiet"),
    ],
)
def test_a_pod_is_followed_stopped_and_deleted(run, action, call):
    code, _, calls = run({"gcloud": ""}, "tpu_pod.sh", action, "pod")
    assert code == 0 and calls == [f"gcloud compute tpus {call}"]


def test_a_pod_gets_this_commit(run):
    code, output, calls = run({"gcloud": ""}, "tpu_pod.sh", "install", "pod")
    if "not a git repository" in output or "not a valid object" in output:
        pytest.skip("no commit to send: this is not a checkout")
    assert code == 0
    assert re.fullmatch(
        r"gcloud compute tpus tpu-vm scp \S+\.tar\.gz pod:hubert_jax.tar.gz --worker=all", calls[0]
    )


SLURM = {
    "srun": """
trap 'exit 130' TERM
echo $$ > "$FOLDER/step"
[[ ${SIGNAL:-} ]] && kill -"$SIGNAL" "$PPID"
for ((n = 0; n < TENTHS; n++)); do sleep 0.1; done
exit "${CODE:-0}" """,
    "scancel": 'kill -TERM "$(cat "$FOLDER/step")"',
    "squeue": 'echo "${STATE:-RUNNING}"',
    "scontrol": 'kill -KILL "$PPID"',  # SLURM ends the script with the job
}


@pytest.mark.parametrize(
    ("signal", "code", "is_requeued"),
    [("USR1", "0", True), ("", "130", True), ("", "143", True), ("", "1", False), ("", "0", False)],
)
def test_slurm_puts_a_job_back_that_was_stopped_and_no_other(
    run, tmp_path, signal, code, is_requeued
):
    variables = {"SIGNAL": signal, "CODE": code, "FOLDER": str(tmp_path), "SLURM_JOB_ID": "7"}
    variables["TENTHS"] = "100" if signal else "1"
    ended, _, calls = run(SLURM, "slurm.sh", "run", "--workdir=a b", **variables)
    assert calls[0] == "srun --kill-on-bad-exit=1 hubert run --workdir=a b"
    assert ("scontrol requeue 7" in calls) == is_requeued
    assert ("scancel --signal=TERM 7" in calls) == (signal == "USR1")
    assert is_requeued or ended == int(code)


@pytest.mark.parametrize(
    ("state", "is_requeued"), [("RUNNING", True), ("COMPLETING", False), ("PENDING", False)]
)
def test_slurm_puts_no_job_back_that_was_cancelled(run, tmp_path, state, is_requeued):
    """scancel ends the tasks as a preemption does; only the job's state tells them apart."""
    variables = {"CODE": "130", "TENTHS": "1", "FOLDER": str(tmp_path), "SLURM_JOB_ID": "7"}
    ended, _, calls = run(SLURM, "slurm.sh", "run", **variables, STATE=state)
    assert ("scontrol requeue 7" in calls) == is_requeued
    assert is_requeued or ended == 130


@pytest.mark.parametrize("script_lives", [True, False])
def test_slurm_puts_a_job_back_whose_tasks_do_not_hear(run, tmp_path, script_lives):
    """After 120 s; but not from a timer that has outlived its script: the job may run again."""
    programs = SLURM | {
        "srun": f"""
trap '' TERM
kill -USR1 "$PPID"
/bin/sleep 0.5
{"" if script_lives else 'kill -KILL "$PPID"'}
/bin/sleep 2""",
        "scancel": "",
        "sleep": "exec /bin/sleep 1",  # instead of 120
    }
    # In a shell, which takes note of the script's end at once.
    words = ("-c", f"{LAUNCH}/slurm.sh run; true")
    _, _, calls = run(programs, "/bin/bash", *words, FOLDER=str(tmp_path), SLURM_JOB_ID="7")
    assert "sleep 120" in calls and "scancel --signal=TERM 7" in calls
    assert ("scontrol requeue 7" in calls) == script_lives


# What v1alpha2 of JobSet knows on its upper floors, from the resource's definition; what is below
# is a Job of Kubernetes.
JOB_SET = {
    "spec": {"coordinator", "failurePolicy", "managedBy", "network", "replicatedJobs",
             "startupPolicy", "successPolicy", "suspend", "ttlSecondsAfterFinished"},
    "failurePolicy": {"maxRestarts", "restartStrategy", "rules"},
    "network": {"enableDNSHostnames", "publishNotReadyAddresses", "subdomain"},
    "replicatedJob": {"dependsOn", "name", "replicas", "template"},
}  # fmt: skip


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_manifests_are_job_sets_whose_hosts_are_counted_once(path):
    job_set = yaml.safe_load(path.read_text())
    assert (job_set["apiVersion"], job_set["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    spec = job_set["spec"]
    assert spec.keys() <= JOB_SET["spec"]
    assert spec["failurePolicy"].keys() <= JOB_SET["failurePolicy"]
    assert spec.get("network", {}).keys() <= JOB_SET["network"]
    (group,) = spec["replicatedJobs"]
    assert group.keys() <= JOB_SET["replicatedJob"]
    job = group["template"]["spec"]
    assert job["completionMode"] == "Indexed" and job["parallelism"] == job["completions"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    assert container["resources"]["requests"] == container["resources"]["limits"]
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}
    told = {variable["name"]: variable.get("value") for variable in container.get("env", [])}
    if told:
        first = f"{job_set['metadata']['name']}-{group['name']}-0-0.{job_set['metadata']['name']}"
        assert told["JAX_NUM_PROCESSES"] == str(job["parallelism"])
        assert told["JAX_COORDINATOR_ADDRESS"].startswith(f"{first}:")


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_the_jobs_of_a_set_keep_to_the_schema_of_kubernetes(path):
    template = yaml.safe_load(path.read_text())["spec"]["replicatedJobs"][0]["template"]
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "hubert"}, **template}
    version = kubernetes_validate.latest_version()
    kubernetes_validate.validate(job, version, strict=True)
    job["spec"]["template"]["spec"]["nodeSelecter"] = {}
    with pytest.raises(kubernetes_validate.ValidationError, match="nodeSelecter"):
        kubernetes_validate.validate(job, version, strict=True)


KEEPS = "mmap_max=0:glibc.malloc.trim_threshold="


@pytest.mark.parametrize(
    ("variables", "keeps"),
    [
        ({"JAX_PLATFORMS": "cpu", "GLIBC_TUNABLES": ""}, True),
        ({"JAX_PLATFORMS": "", "GLIBC_TUNABLES": ""}, not glob.glob("/dev/nvidia[0-9]*")),
        ({"JAX_PLATFORMS": "cpu", "GLIBC_TUNABLES": "glibc.malloc.check=0"}, False),
    ],
)
def test_on_a_cpu_malloc_keeps_its_memory(run, variables, keeps):
    hubert = 'echo "words: $*"; echo "$GLIBC_TUNABLES"'
    code, output, _ = run({"hubert": hubert}, "local.sh", "run", "--config=x", **variables)
    assert code == 0 and "words: run --config=x" in output
    assert (KEEPS in output) == keeps
