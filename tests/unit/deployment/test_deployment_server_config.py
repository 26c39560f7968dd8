"""What is wrong in ``server.yaml`` is said in one line when it is read, not in a trace when it is used."""

from pathlib import Path

import pytest

from federated.deployment.server_config import read_server_config
from federated.errors import ConfigError


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("door_url: https://[::1", "door_url"),
        ("door_url: https://x:99999", "door_url"),
        ("door_url: https://x:abc", "door_url"),
        ("door_url: ftp://x", "door_url"),
        ("door_url: x", "door_url"),
        ("hosts: ['[x']", "hosts"),
        ("hosts: ['[::1]']", "hosts"),
        ("hosts: [a:1]", "hosts"),
        ("hosts: []", "hosts"),
        ("door_port: 70000", "door_port"),
        ("door_prot: 1", "door_prot"),
        ("- door_port", "expected keys"),
        ("a: {", "cannot read"),
        ("name: 'a b'", "name"),
    ],
)
def test_a_wrong_line_is_one_error(tmp_path: Path, line: str, said: str) -> None:
    (tmp_path / "server.yaml").write_text(line + "\n")
    with pytest.raises(ConfigError, match=said) as caught:
        read_server_config(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("lines", "url"),
    [
        ("hosts: ['::1']", "https://[::1]:9443"),
        ("hosts: [a.example]\ndoor_port: 1", "https://a.example:1"),
        ("door_url: https://b.example", "https://b.example"),
    ],
)
def test_how_devices_call_it(tmp_path: Path, lines: str, url: str) -> None:
    (tmp_path / "server.yaml").write_text(lines + "\n")
    config = read_server_config(tmp_path)
    assert config.url == url
