"""`serve` with options that are wrong at a glance: one line, exit code 2, and no data folder."""

from pathlib import Path

import pytest
from sparsectrl_lcm.runtime.format.bundle import demo_bundle
from sparsectrl_lcm.service.http.local_authority import local_certificate

from .test_serve import refused


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ("--port 99999", "--port: 99999 is not allowed; give 1 to 65535"),
        ("--port 8001 --tls-port 8001", "--tls-port: 8001 is already the port of --port; give another port"),
        ("--public-url nope", "--public-url: 'nope' is not allowed; give http(s)://HOST"),
        ("--public-url https://a/b", "--public-url: 'https://a/b' is not allowed"),
        ("--set queue", "--set queue: not allowed; give NAME=VALUE"),
        ("--backend nope", "--backend: 'nope' is unknown; allowed are auto, "),
        ("--bundle nope", "bundle: 'nope' is not a folder"),
        (
            "--backend onnxruntime --devices GPU",
            "--devices: onnxruntime does not use GPU; give cuda:N",
        ),
        ("--endpoint portraits", "--endpoint: 'portraits' is not allowed; give OWNER/NAME"),
        ("--endpoint me/a= --endpoint me/b=b", "--endpoint: me/a has no bundle; give OWNER/NAME=BUNDLE"),
        ("--endpoint me/a=a --endpoint me/b", "--endpoint: me/b has no bundle; give OWNER/NAME=BUNDLE"),
        ("--endpoint me/a --endpoint me/b=b", "--endpoint: me/a has no bundle; give OWNER/NAME=BUNDLE"),
        ("--bundle a --endpoint me/a --endpoint me/b", "--endpoint: me/b has no bundle; give OWNER/NAME=BUNDLE"),
        ("--endpoint me/a=a --endpoint me/a=b", "--endpoint: me/a is given twice; give each bundle a name of its own"),
        ("--endpoint me/a=a --bundle b", "--bundle: every name of --endpoint has a bundle of its own; add --endpoint"),
        ("--bundle nope --endpoint me/a --endpoint me/b=b", "--endpoint: me/a: 'nope' is not a folder"),
        ("--endpoint me/a --bundle nope", "bundle: 'nope' is not a folder"),
        ("--warm 1000", "--warm: '1000' is not allowed; give WIDTHxHEIGHT"),
        ("--weights anime", "--weights: 'anime' is not allowed; give NAME=BUNDLE"),
        (
            f"--backend onnxruntime --weights anime={demo_bundle()}",
            "--weights: onnxruntime cannot change the weights of its engines; serve each bundle under a name",
        ),
        (
            f"--devices cpu --weights anime={demo_bundle()}",
            "--weights: they need an NVIDIA GPU, and none is used here; serve each bundle under a name",
        ),
        ("--weights anime=nope", "--weights: anime: 'nope' is not a folder"),
        (
            f"--bundle {demo_bundle()} --endpoint me/a --endpoint me/b={demo_bundle()} --weights me/b:anime=nope",
            "--weights: me/b: anime: 'nope' is not a folder",
        ),
        ("--threads 0", "--threads: 0 is not allowed; give a whole number from 1 on"),
        ("--tls-certificate a", "--tls-certificate and --tls-key go together"),
        ("--tls-certificate a --tls-key a", "--tls-certificate: a: No such file"),
    ],
)
def test_what_is_wrong_at_a_glance(capfd: pytest.CaptureFixture[str], tmp_path: Path, options: str, told: str) -> None:
    assert refused(capfd, "serve", "--data", tmp_path / "data", *options.split()).startswith(told)
    assert not (tmp_path / "data").exists()


def test_certificates_and_keys_that_are_none(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    authority, certificate, key = local_certificate(tmp_path / "a")
    _, _, other = local_certificate(tmp_path / "b")
    for given, of, told in (
        (key, key, f"--tls-certificate: {key} holds no certificate"),
        (certificate, authority, f"--tls-key: {authority} holds no key"),
        (certificate, other, f"--tls-key: {other} cannot be used with the certificate {certificate}"),
    ):
        command = ("serve", "--data", tmp_path / "data", "--tls-port", 8443)
        assert refused(capfd, *command, "--tls-certificate", given, "--tls-key", of).startswith(told)
