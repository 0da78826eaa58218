"""What is deployed: the compose file, the manifests and the Dockerfile, as far as a machine without Docker can tell."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import sqlalchemy as sa
import typer.main
import yaml

from pipeline.cli.main import app
from pipeline.config.settings import Settings
from pipeline.engines import registry

ROOT = Path(__file__).resolve().parents[2]
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
MANIFESTS: list[dict[str, Any]] = [
    document
    for path in sorted((ROOT / "deploy/kubernetes").glob("*.yaml"))
    for document in yaml.safe_load_all(path.read_text())
]
PODS = {m["metadata"]["name"]: m["spec"]["template"]["spec"] for m in MANIFESTS if m["kind"] in ("Deployment", "Job")}


def _commands() -> list[tuple[str, list[str]]]:
    found = [(f"compose {name}", s["command"]) for name, s in COMPOSE.items() if "rowmill" in s.get("image", "")]
    found += [(f"compose {n}, health", s["healthcheck"]["test"][1:]) for n, s in COMPOSE.items() if "healthcheck" in s]
    how_to = (ROOT / "docs/how-to/deploy.md").read_text()
    for line in re.findall(r"^(?:docker compose exec control )?(rowmill [^#\n…]*)", how_to, re.MULTILINE):
        found.append((f"deploy.md {line}", shlex.split(line)))
    for name, pod in PODS.items():
        container = pod["containers"][0]
        found.append((f"kubernetes {name}", container["command"]))
        found += [(f"kubernetes {name}, {c['name']}", c["command"]) for c in pod.get("initContainers", [])]
        for probe in ("startupProbe", "livenessProbe"):
            if probe in container:
                found.append((f"kubernetes {name}, {probe}", container[probe]["exec"]["command"]))
    return [(where, words) for where, words in found if words[0] == "rowmill"]


def _parsed(words: list[str]) -> dict[str, Any]:
    """The options of one of our command lines; it is parsed, and not run. Raises what the command line would say."""
    command: Any = typer.main.get_command(app)
    context = command.make_context("rowmill", list(words[1:]))
    while hasattr(command, "commands"):
        name, command, rest = command.resolve_command(context, [*context._protected_args, *context.args])
        context = command.make_context(name, rest, parent=context)
    parameters: dict[str, Any] = context.params
    return parameters


@pytest.mark.parametrize(("where", "words"), _commands(), ids=[where for where, _ in _commands()])
def test_our_command_line_takes_the_command(where: str, words: list[str]) -> None:
    options = _parsed(words)
    if words[1:3] == ["worker", "start"]:
        named = set((options["engines"] or "none").split(",")) - {"none"}
        assert named <= set(registry.names())


def test_no_two_workers_share_a_gpu() -> None:
    ids = []
    for service in COMPOSE.values():
        devices = service.get("deploy", {}).get("resources", {}).get("reservations", {}).get("devices", [])
        ids += [number for device in devices for number in device["device_ids"]]
    assert len(ids) == len(set(ids)) == 2
    variables = dict(line.split("=") for line in _env_lines())
    assert len({variables[re.findall(r"\w+", number)[0]] for number in ids}) == 2, "nor by deploy/example.env"


def _env_lines() -> list[str]:
    return [line for line in (ROOT / "deploy/example.env").read_text().splitlines() if "=" in line and line[0] != "#"]


def test_the_images_for_onnx_prepare_images_and_export_models() -> None:
    for name in ("control", "onnx-worker", "onnx-gpu-worker"):
        extras = set(COMPOSE[name]["build"]["args"]["EXTRAS"].split(","))
        assert {"images", "export"} <= extras, name


def test_there_are_workers_for_every_queue() -> None:
    for commands in (
        [service["command"] for service in COMPOSE.values() if "rowmill" in service.get("image", "")],
        [pod["containers"][0]["command"] for pod in PODS.values()],
    ):
        started = [_parsed(words) for words in commands if words[1:3] == ["worker", "start"]]
        engines = {name for options in started for name in options["engines"].split(",")}
        assert engines >= {"onnx", "vllm", "none"}
        assert any(options["control"] for options in started), "somebody has to plan and publish"


def test_supervisors_wait_longer_than_a_drain() -> None:
    grace = Settings.model_fields["drain_grace_seconds"].default
    for name, service in COMPOSE.items():
        if service.get("command", [""])[:3] == ["rowmill", "worker", "start"]:
            assert int(service["stop_grace_period"].removesuffix("s")) >= grace + 30, name
    config = next(m for m in MANIFESTS if m["kind"] == "ConfigMap")["data"]
    for name, pod in PODS.items():
        if pod["containers"][0]["command"][:3] == ["rowmill", "worker", "start"]:
            assert pod["terminationGracePeriodSeconds"] >= float(config["ROWMILL_DRAIN_GRACE_SECONDS"]) + 30, name


def test_images_are_pinned() -> None:
    names = [service["image"] for service in COMPOSE.values()]
    names += re.findall(r"^FROM (\S+)", (ROOT / "deploy/Dockerfile").read_text(), re.MULTILINE)
    for name in names:
        _, _, tag = name.partition(":")
        assert tag and tag != "latest", name
        assert name.startswith("rowmill:") or re.search(r"\d+\.\d+|RELEASE", tag), f"{name} moves"


def test_the_image_runs_as_nobody_special_and_holds_no_secret() -> None:
    text = (ROOT / "deploy/Dockerfile").read_text()
    lines = [line for line in text.replace("\\\n", " ").splitlines() if line and not line.startswith("#")]
    words = [line.split(maxsplit=1)[0] for line in lines]
    assert words.count("FROM") == 2, "a stage to build in, and one to run"
    assert not set(words) & {"ADD", "MAINTAINER"}
    last = text[text.rindex("FROM ") :]
    users = re.findall(r"^USER (\S+)", last, re.MULTILINE)
    assert users and users[-1].isdigit() and int(users[-1]) >= 1000
    assert last.index("USER ") > last.rindex("RUN "), "nothing is done as root after it"
    for line in lines:
        if line.startswith(("ENV", "ARG")):
            assert not re.search(r"PASSWORD|SECRET|TOKEN|_KEY", line), line
        if "apt-get install" in line:
            assert "--no-install-recommends" in line and "rm -rf /var/lib/apt/lists" in line
    assert re.search(r'^CMD \["', last, re.MULTILINE), "exec form: signals reach it"


def test_secrets_come_from_outside() -> None:
    for text in ((ROOT / "docker-compose.yml").read_text(), *_manifest_texts()):
        for value in re.findall(r"^\s+\w*(?:PASSWORD|SECRET_KEY)\w*: (\S+)", text, re.MULTILINE):
            assert value.startswith("${"), value
    for name, pod in PODS.items():
        [container] = pod["containers"]
        assert {"secretRef": {"name": "rowmill"}} in container["envFrom"], name
        assert not [env for env in container.get("env", []) if "value" in env], name


def _manifest_texts() -> list[str]:
    paths = (ROOT / "deploy/kubernetes").glob("*.yaml")
    return [path.read_text() for path in paths if ".example." not in path.name]


def test_manifests_hold_together() -> None:
    kinds = {(m["kind"], m["metadata"]["name"]) for m in MANIFESTS if "metadata" in m}
    for manifest in MANIFESTS:
        if manifest["kind"] == "Kustomization":
            listed = set(manifest["resources"])
            files = {path.name for path in (ROOT / "deploy/kubernetes").glob("*.yaml")}
            assert listed == {name for name in files if ".example." not in name} - {"kustomization.yaml"}
            used = {pod["containers"][0]["image"] for pod in PODS.values()}
            assert {image["name"] for image in manifest["images"]} == used
        if manifest["kind"] == "Deployment":
            labels = manifest["spec"]["template"]["metadata"]["labels"]
            assert manifest["spec"]["selector"]["matchLabels"].items() <= labels.items()
        if manifest["kind"] in ("ConfigMap", "Secret"):
            for name in manifest.get("data", manifest.get("stringData", {})):
                if name.startswith("ROWMILL_"):
                    assert name.removeprefix("ROWMILL_").lower() in Settings.model_fields, name
        if manifest["kind"] == "ScaledObject":
            assert ("Deployment", manifest["spec"]["scaleTargetRef"]["name"]) in kinds
        if manifest["kind"] == "PodDisruptionBudget":
            labels = manifest["spec"]["selector"]["matchLabels"]
            assert ("Deployment", f"rowmill-{labels['app.kubernetes.io/component']}") in kinds
    for name, pod in PODS.items():
        assert pod["securityContext"]["runAsNonRoot"] is True, name
        [container] = pod["containers"]
        assert container["resources"]["requests"] and container["resources"]["limits"]["memory"], name
        mounted = {mount["name"] for mount in container.get("volumeMounts", [])}
        assert mounted == {volume["name"] for volume in pod.get("volumes", [])}, name
        for volume in pod["volumes"]:
            if claim := volume.get("persistentVolumeClaim"):
                assert ("PersistentVolumeClaim", claim["claimName"]) in kinds, f"{name}: nothing makes {claim}"


OTHERS = ("Kustomization", "ScaledObject")
"""Kinds that do not come with Kubernetes."""


@pytest.mark.parametrize(
    "manifest",
    [manifest for manifest in MANIFESTS if manifest["kind"] not in OTHERS],
    ids=lambda manifest: f"{manifest['kind']} {manifest['metadata']['name']}",
)
def test_kubernetes_knows_every_field(manifest: dict[str, Any]) -> None:
    """By the API's own schemas: a field that is misspelt, or stands in the wrong place, is refused."""
    kubernetes_validate.validate(manifest, "1.33", strict=True)


def test_pods_may_do_nothing_that_they_need_not() -> None:
    for name, pod in PODS.items():
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert pod["automountServiceAccountToken"] is False, name
        for container in (*pod["containers"], *pod.get("initContainers", [])):
            context = container["securityContext"]
            assert context["readOnlyRootFilesystem"] and not context["allowPrivilegeEscalation"], name
            assert context["capabilities"] == {"drop": ["ALL"]}, name
            writable = {m["mountPath"] for m in container["volumeMounts"] if not m.get("readOnly")}
            assert {"/tmp", "/cache"} <= writable, f"{name}: it has nowhere to write"
    config = next(m for m in MANIFESTS if m["kind"] == "ConfigMap")["data"]
    for variable in ("HOME", "XDG_CACHE_HOME", "ROWMILL_CACHE_DIR", "ROWMILL_DATA_DIR"):
        assert config[variable].startswith("/cache"), variable


def test_each_deployment_can_be_disrupted_by_one_pod_at_a_time() -> None:
    names = {m["metadata"]["name"]: m for m in MANIFESTS if m["kind"] == "PodDisruptionBudget"}
    assert set(names) == {m["metadata"]["name"] for m in MANIFESTS if m["kind"] == "Deployment"}
    for manifest in names.values():
        assert manifest["spec"]["maxUnavailable"] == 1, "a budget of one pod that must stay would block a drain"


def test_the_schema_has_a_job_for_this_version_and_pods_wait_for_it() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert f"rowmill-migrate-{project['version']}" in PODS
    for name, pod in PODS.items():
        if not name.startswith("rowmill-migrate"):
            assert [c["command"] for c in pod["initContainers"]] == [["rowmill", "db", "wait"]], name
            assert pod["initContainers"][0]["image"] == pod["containers"][0]["image"], name
            assert "startupProbe" in pod["containers"][0], name


def test_containers_are_bounded() -> None:
    for name, service in COMPOSE.items():
        assert service["logging"]["options"].keys() >= {"max-size", "max-file"}, f"{name}: its logs grow for ever"
        assert "mem_limit" in service or service.get("restart") == "no", f"{name}: it may take all memory"
        if service.get("restart") != "no" and name != "flower":
            assert "healthcheck" in service, name


def test_models_are_not_made_as_root() -> None:
    text = (ROOT / "docker-compose.yml").read_text()
    for name, service in COMPOSE.items():
        for volume in service.get("volumes", []):
            if isinstance(volume, dict) and volume["type"] == "bind":
                assert volume["bind"] == {"create_host_path": False} and volume["read_only"], name
    assert "mkdir -p models" in text and "mkdir -p models" in (ROOT / "docs/how-to/deploy.md").read_text()


@pytest.mark.postgres
def test_keda_asks_what_postgres_can_answer(postgres_database: str) -> None:
    scaled = [m["spec"]["triggers"][0]["metadata"] for m in MANIFESTS if m["kind"] == "ScaledObject"]
    assert scaled
    engine = sa.create_engine(postgres_database)
    with engine.connect() as connection:
        for trigger in scaled:
            assert connection.execute(sa.text(trigger["query"])).scalar_one() == 0
    engine.dispose()
