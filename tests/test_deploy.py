"""What deploy/ holds: valid where a tool can say so, consistent with itself, closed to the network."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import psdiff
import pytest

yaml = pytest.importorskip("yaml", reason="pyyaml is not installed")

DEPLOY = Path(psdiff.__file__).resolve().parent / "deploy"
CHART = DEPLOY / "helm" / "psdiff"
VARIABLES = {
    "PSDIFF_BUNDLE": "/bundle",
    "PSDIFF_SOURCES": "rtsp://one rtsp://two",
    "GRAFANA_PASSWORD": "secret",
}


@pytest.fixture(scope="module")
def services():
    return yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]


def compose_command():
    if (
        shutil.which("docker")
        and not subprocess.run(["docker", "compose", "version"], capture_output=True).returncode
    ):
        return ["docker", "compose"]
    return ["docker-compose"] if shutil.which("docker-compose") else None


def compose_config(variables):
    command = compose_command()
    if command is None:
        pytest.skip("neither docker compose nor docker-compose is installed")
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES} | variables
    command += ["-f", str(DEPLOY / "compose.yaml"), "config"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


def test_compose_takes_the_file():
    result = compose_config(VARIABLES)
    assert result.returncode == 0, result.stderr
    config = yaml.safe_load(result.stdout)
    assert set(config["services"]) == {"triton", "psdiff", "prometheus", "grafana"}
    assert config["services"]["psdiff"]["environment"]["PSDIFF_SOURCES"] == "rtsp://one rtsp://two"


@pytest.mark.parametrize("missing", VARIABLES)
def test_compose_says_what_must_be_given(missing):
    result = compose_config({name: value for name, value in VARIABLES.items() if name != missing})
    assert result.returncode != 0
    assert "give " in result.stderr


def test_ports_are_open_on_this_machine_alone(services):
    ports = [port for service in services.values() for port in service.get("ports", [])]
    assert ports
    assert all(port.startswith("127.0.0.1:") for port in ports)


def test_what_is_mounted_from_here_is_here(services):
    mounted = [volume.split(":")[0] for service in services.values() for volume in service.get("volumes", [])]
    files = [name for name in mounted if name.startswith("./") and "$" not in name]
    assert len(files) == 3
    for name in files:
        assert (DEPLOY / name).exists(), name


def test_images_are_built_by_a_target_of_the_dockerfile_or_pinned(services):
    targets = re.findall(r"^FROM .* AS (\w+)$", (DEPLOY / "Dockerfile").read_text(), re.MULTILINE)
    for service in services.values():
        if "build" in service:
            assert service["build"]["target"] in targets
        else:
            assert re.search(r":v?\d+\.\d+\.\d+$", service["image"]), service["image"]


def test_prometheus_asks_a_service_and_grafana_asks_prometheus(services):
    [job] = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())["scrape_configs"]
    assert [target.split(":")[0] for each in job["static_configs"] for target in each["targets"]] == [
        "triton"
    ]
    provisioning = DEPLOY / "grafana" / "provisioning"
    [source] = yaml.safe_load((provisioning / "datasources" / "prometheus.yaml").read_text())["datasources"]
    assert source["url"] == "http://prometheus:9090"
    [provider] = yaml.safe_load((provisioning / "dashboards" / "psdiff.yaml").read_text())["providers"]
    assert f"./grafana/dashboards:{provider['options']['path']}:ro" in services["grafana"]["volumes"]


def rendered_chart():
    """The chart's objects. Its template holds plain substitutions only, so that no helm is needed to fill it in."""
    values = {"Values": yaml.safe_load((CHART / "values.yaml").read_text()), "Release": {"Name": "test"}}

    def value(match):
        found = values
        for name in match[1].split("."):
            found = found[name]
        return str(found)

    text = (CHART / "templates" / "triton.yaml").read_text()
    filled = re.sub(r"\{\{ \.([\w.]+) \}\}", value, text)
    assert "{{" not in filled
    return {each["kind"]: each for each in yaml.safe_load_all(filled)}


def test_the_chart_serves_as_compose_does(services):
    objects = rendered_chart()
    pod = objects["Deployment"]["spec"]["template"]
    [container] = pod["spec"]["containers"]
    assert container["args"] == services["triton"]["command"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {
        each["name"] for each in pod["spec"]["volumes"]
    }
    selector = objects["Service"]["spec"]["selector"]
    assert selector == objects["Deployment"]["spec"]["selector"]["matchLabels"] == pod["metadata"]["labels"]
    named = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert {port["targetPort"]: port["port"] for port in objects["Service"]["spec"]["ports"]} == named
    assert objects["Service"]["spec"]["type"] == "ClusterIP"


def test_every_value_of_the_chart_is_used():
    text = (CHART / "templates" / "triton.yaml").read_text()

    def paths(values, prefix=".Values"):
        for name, value in values.items():
            yield from paths(value, f"{prefix}.{name}") if isinstance(value, dict) else [f"{prefix}.{name}"]

    for path in paths(yaml.safe_load((CHART / "values.yaml").read_text())):
        assert f"{{{{ {path} }}}}" in text, path
