"""The names and content types of files."""

import json
import random
from urllib.parse import unquote, urlsplit

import httpx
import pytest
from sparsectrl_lcm.service.objects.file_metadata import safe_content_type, safe_name

from .conftest import as_key


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("keyframe.png", "keyframe.png"),
        ("My Drawing (1).PNG", "My_Drawing_1_.PNG"),
        ("../../etc/passwd", "passwd"),
        ("..\\..\\windows\\system.ini", "system.ini"),
        ("/", "file.png"),
        ("..", "file.png"),
        ("", "file.png"),
        (None, "file.png"),
        (".htaccess", "htaccess"),
        ("a\r\nSet-Cookie: x=y.png", "a_Set-Cookie_x_y.png"),
        ("nul\0byte.png", "nul_byte.png"),
        ("スケッチ.png", "スケッチ.png"),
        ("cafe\u0301.png", "caf\u00e9.png"),
        ("right\u202eleft.png", "right_left.png"),
        ("a" * 300 + ".png", "a" * 96 + ".png"),
        ("1700000000000.octet", "1700000000000.octet"),
        ("%2e%2e%2fpasswd", "2e_2e_2fpasswd"),
        ("archive.tar.gz", "archive.tar.gz"),
    ],
)
def test_names_of_files(given: str | None, expected: str) -> None:
    assert safe_name(given, "image/png") == expected


def test_any_name_gives_a_url_that_works(http: httpx.Client, key: str, base: str) -> None:
    names = random.Random(5)
    alphabet = "../\\\0\r\n\t :?#%&;=@+*\"'<>|~`{}[]()a.Z9_-é漢\u202e\U0001f600\ud800"
    for index in range(150):
        name = "".join(names.choices(alphabet, k=names.randint(0, 200 if index % 10 == 0 else 12)))
        about = {"file_name": name, "content_type": "image/png"}
        answer = http.post("/storage/upload/initiate", content=json.dumps(about), headers=as_key(key))
        urls = answer.json()
        url = urls["file_url"]
        assert url.isascii()
        _, folder, file_id, shown = urlsplit(url).path.split("/")
        assert (folder, len(file_id)) == ("files", 22)
        assert unquote(shown) == safe_name(name, "image/png")
        assert shown not in ("", ".", "..")
        assert not set(unquote(shown)) & set("/\\\0\r\n\"'<>;: ?#%\u202e")
        assert unquote(shown)[0] != "."
        assert len(unquote(shown).encode()) <= 100
        if index % 5 == 0:
            http.put(urls["upload_url"], content=b"x").raise_for_status()
            answer = http.get(url)
            assert (answer.status_code, str(answer.url)) == (200, url)


def test_names_in_headers(http: httpx.Client, key: str) -> None:
    for raw, expected in [("スケッチ.png".encode(), "スケッチ.png"), ("é.png".encode("latin-1"), "é.png")]:
        headers = [(b"Authorization", f"Key {key}".encode()), (b"X-Fal-File-Name", raw)]
        url = http.post("/files/upload", content=b"x", headers=headers).json()["access_url"]
        assert unquote(url).endswith(f"/{expected}")
        assert http.get(url).status_code == 200


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("image/png", "image/png"),
        ("Image/PNG; charset=x", "image/png"),
        ("image/svg+xml", "image/svg+xml"),
        ("application/vnd.api+json", "application/vnd.api+json"),
        ("", "application/octet-stream"),
        (None, "application/octet-stream"),
        ("image", "application/octet-stream"),
        ("image/png\r\nX: y", "application/octet-stream"),
        ("image/png/x", "application/octet-stream"),
        ("é/png", "application/octet-stream"),
        ("a" * 99 + "/b", "application/octet-stream"),
    ],
)
def test_content_types(given: str | None, expected: str) -> None:
    assert safe_content_type(given) == expected
