"""Who may use a server, and for how much."""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from live import STOP, Running, opened, receive, rest, running, start
from overfit import Overfit
from tiny import node, tiny
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus

from speechkit.app import serve
from speechkit.app.cli import main
from speechkit.app.serve import service as service_module
from speechkit.app.serve.streams import Limits
from speechkit.pretrained import save
from speechkit.recogniser import Recogniser
from speechkit.session import Session

ELSEWHERE = "https://speech.example.com"


@pytest.fixture(scope="module")
def model() -> Recogniser:
    return tiny()


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("app") / "page"
    (folder / "inner").mkdir(parents=True)
    for name in ("index.html", "page.css", "page.js", "icon.svg", "inner/secret.txt", "../secret.txt"):
        (folder / name).write_text(f"this is {name}")
    return folder


@pytest.fixture(scope="module")
def server(model: Recogniser, page: Path) -> Iterator[Running]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(service_module, "PAGE", page)
        limits = Limits(streams=3, per_address=2, resume=0.1)
        with running(Session(model, slots=3), limits, token="open sesame", origins=[ELSEWHERE]) as found:
            yield found


def handshake(server: Running, origin: str | None, host: str | None = None) -> int:
    """The HTTP status of a connection that a page of this origin opens."""

    async def talk() -> int:
        url = server.url.replace("127.0.0.1", host or "127.0.0.1")
        try:
            async with connect(url, origin=origin, host="127.0.0.1", port=server.port):  # type: ignore[arg-type]
                return 101
        except InvalidStatus as error:
            return error.response.status_code

    return asyncio.run(talk())


def test_a_page_may_connect_to_its_own_server_only(server: Running) -> None:
    own = f"http://127.0.0.1:{server.port}"
    assert [handshake(server, origin) for origin in (None, own, ELSEWHERE)] == [101, 101, 101]
    strangers = (
        "http://evil.example",
        "null",
        "",
        "http://127.0.0.1:1",
        f"http://127.0.0.1:{server.port}.evil.example",
    )
    assert [handshake(server, origin) for origin in strangers] == [403] * len(strangers)


def test_another_name_that_was_made_to_point_here_is_no_own_page(server: Running) -> None:
    rebound = f"evil.example:{server.port}"
    assert handshake(server, f"http://{rebound}", "evil.example") == 403
    assert handshake(server, f"http://localhost:{server.port}", "localhost") == 101


@pytest.mark.parametrize("token", [None, "", "open", "open sesame ", 5, ["open sesame"], "\ud800"])
def test_who_does_not_know_the_token_gets_no_stream(server: Running, token: object) -> None:
    async def talk() -> tuple[dict, int]:
        async with connect(server.url) as client:
            error = await opened(client, start(token=token))
            await rest(client)
            return error, client.close_code

    error, code = asyncio.run(talk())
    assert (error["code"], error["retry"], code) == ("unauthorised", False, 1008)
    assert "open sesame" not in json.dumps(error)


def test_resuming_needs_the_token_too_and_metrics_as_well(server: Running) -> None:
    async def talk() -> list[str]:
        async with connect(server.url) as client:
            ready = await opened(client, start(token="open sesame"))
            found = [ready["type"]]
            for more in ({}, {"token": "open sesame"}):
                async with connect(server.url) as other:
                    answer = await opened(other, json.dumps({"type": "resume", "stream": ready["stream"], **more}))
                    found.append(answer.get("code", answer["type"]))
            return found

    assert asyncio.run(talk()) == ["ready", "unauthorised", "ready"]
    server.settle()
    assert httpx.get(f"{server.http}/metrics").status_code == 401
    assert httpx.get(f"{server.http}/metrics", headers={"Authorization": "Bearer open sesame"}).status_code == 200
    assert httpx.get(f"{server.http}/health").json()["status"] == "ok"


def test_only_files_of_the_page_can_be_asked_for(server: Running, page: Path) -> None:
    def get(path: str) -> bytes:
        """As it is: a client library would tidy the path up."""
        with socket.create_connection(("127.0.0.1", server.port), 5) as plain:
            plain.sendall(f"GET {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n".encode())
            return b"".join(iter(lambda: plain.recv(4096), b""))

    for path in ("/", "/page/index.html"):
        assert b" 200 OK" in get(path) and get(path).endswith(b"this is index.html")
    kinds = {"page.css": "text/css", "page.js": "text/javascript", "icon.svg": "image/svg+xml"}
    for name, kind in kinds.items():
        assert f"content-type: {kind}".encode() in get(f"/page/{name}").lower()
    for path in (
        "/page/../secret.txt",
        "/page/%2e%2e/secret.txt",
        "/page/..%2fsecret.txt",
        "/page/inner/secret.txt",
        "/page/inner%2fsecret.txt",
        "/page/inner",
        "/page/",
        "/page//etc/passwd",
        f"/page/{page}/index.html",
        "/secret.txt",
        "/page/page.js%00.txt",
        "/v1/stream",
    ):
        found = get(path)
        assert not found.startswith(b"HTTP/1.1 200") and b"this is" not in found, path


def test_every_answer_carries_the_security_headers(server: Running) -> None:
    for path in ("/", "/page/page.js", "/page/none", "/none", "/health", "/health/", "/metrics"):
        headers = httpx.get(server.http + path).headers
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["content-security-policy"].startswith("default-src 'none'; script-src 'self';")
        assert "unsafe" not in headers["content-security-policy"]
        assert "access-control-allow-origin" not in headers and "server" not in headers


def test_streams_are_limited_by_address_and_in_all(server: Running) -> None:
    async def talk() -> list[str]:
        clients = [await connect(server.url) for _ in range(3)]
        answers = [await opened(client, start(token="open sesame")) for client in clients]
        await clients[0].send(STOP)
        await rest(clients[0])
        last = await connect(server.url)
        answers.append(await opened(last, start(token="open sesame")))
        for client in (*clients, last):
            client.transport.abort()
        return [answer.get("message", answer["type"]) for answer in answers]

    assert asyncio.run(talk()) == [
        "ready",
        "ready",
        "An address may have 2 streams at once, but 127.0.0.1 has that many; end one of them first.",
        "ready",
    ]
    server.settle()


def test_a_full_server_says_so(model: Recogniser) -> None:
    with running(Session(model), Limits(streams=1, resume=0.1)) as small:

        async def talk() -> tuple[dict, int]:
            async with connect(small.url) as one, connect(small.url) as other:
                await opened(one, start())
                busy = await opened(other, start())
                await rest(other)
                return busy, other.close_code

        busy, code = asyncio.run(talk())
    assert busy == {
        "type": "error",
        "code": "busy",
        "message": "All 1 streams of this server are taken; try again later.",
        "retry": True,
    }
    assert code == 1013


def test_a_client_that_says_nothing_is_sent_away(model: Recogniser, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service_module, "OPENING", 0.2)
    with running(Session(model), Limits(streams=1)) as patient:

        async def talk() -> dict:
            async with connect(patient.url) as client:
                return await receive(client)

        error = asyncio.run(talk())
    assert error["code"] == "bad_message"
    assert error["message"] == "The first message must come within 0.2 s; connect again."


def test_the_command_listens_on_this_machine_alone_unless_told(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict = {}
    monkeypatch.setattr(serve, "serve", lambda **options: asked.update(options))
    assert main(["serve", "runs/demo"]) == 0
    assert (asked["host"], asked["port"], asked["token"], asked["allow_origin"]) == ("127.0.0.1", 8765, None, ())
    assert (asked["max_streams"], asked["max_per_address"]) == (Limits.streams, Limits.per_address)
    assert (asked["max_seconds"], asked["resume_seconds"]) == (Limits.seconds, Limits.resume)
    assert asked["idle_seconds"] == Limits.idle
    assert [serve.is_local(host) for host in ("127.0.0.1", "::1", "localhost")] == [True] * 3
    assert [serve.is_local(host) for host in ("0.0.0.0", "::", "192.168.1.2", "example.com")] == [False] * 4


def test_what_keeps_a_server_from_starting_is_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], model: Recogniser
) -> None:
    save(model, node(), tmp_path / "model")
    convolution = {"_target_": "speechkit.layers.Convolution", "_partial_": True, "causal": False}
    centred = node(encoder=node()["encoder"] | {"convolution": convolution})
    save(tiny(encoder=centred["encoder"]), centred, tmp_path / "centred")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for argv, sentence in [
            (
                [tmp_path / "model", "--port", port],
                f"127.0.0.1 port {port} cannot be had (Address already in use); choose",
            ),
            ([tmp_path / "model", "--host", "no.such.host.invalid"], "no.such.host.invalid port 8765 cannot be had"),
            (
                [tmp_path / "model", "--port", "0", "--device", "abacus"],
                "--device must be a device of this machine, but",
            ),
            ([tmp_path / "model", "--port", "0", "--chunk-ms", "330"], "multiple of 40 ms, but is 330 ms"),
            ([tmp_path / "model", "--port", "0", "--search", "magic"], "A search must be one of"),
            ([tmp_path / "centred", "--port", "0"], "cannot stream"),
            ([tmp_path / "nowhere"], "must be a model folder or a run, but does not exist"),
        ]:
            assert main(["serve", *map(str, argv)]) == 1
            said = capsys.readouterr().err
            assert said.startswith("speechkit: ") and said.count("\n") == 1 and sentence in said


def test_without_the_extra_the_command_says_how_to_get_it() -> None:
    code = (
        "import sys; sys.modules['starlette'] = None; sys.modules['starlette.applications'] = None\n"
        "from speechkit.app.cli import main; sys.exit(main(['serve', 'runs/demo']))"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == 1
    assert "is not installed; install them with: pip install 'speechkit[serve]'" in ended.stderr


def test_two_passes_are_the_default_where_the_model_has_both_heads(overfit: Overfit) -> None:
    for asked, name in [(None, "Rescored"), ("greedy", "Greedy"), ("prefix_beam", "PrefixBeam")]:
        assert type(serve.ready(str(overfit.folder), "cpu", asked).search).__name__ == name
