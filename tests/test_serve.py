"""`cbtm serve`, as its clients see it: OpenAI's client, raw sockets, and the shell that starts it."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import openai
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

import cbtm_pipeline
import made_server
from cbtm_pipeline import serve
from cbtm_pipeline.base import hub
from cbtm_pipeline.inference import modeling_cbtm  # noqa: F401, registers the model
from made_server import Server

KEY = "correct-horse"
PROMPT = "ship anchor mast"
LONG = 4000  # tokens: many seconds


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_server.write_ensemble(tmp_path_factory.mktemp("made"))


@pytest.fixture(scope="module")
def server(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("serve") / "log"
    with made_server.serving(folder, log, "--max-tokens", str(LONG), "--max-prompt-tokens", "1000") as server:
        yield server


@pytest.fixture(scope="module")
def guarded(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with a key and room for few."""
    log = tmp_path_factory.mktemp("guarded") / "log"
    options = ("--queue", "8", "--concurrency", "2", "--max-body-kib", "4", "--name", "mine")
    with made_server.serving(folder, log, "--host", "0.0.0.0", *options, key=KEY) as server:
        server.url = server.url.replace("0.0.0.0", "127.0.0.1")
        yield server


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return hub.load(AutoModelForCausalLM, folder)


def complete(server: Server, **options: Any) -> Any:
    defaults = {"model": "ensemble", "prompt": PROMPT, "temperature": 0}
    return server.client().completions.create(**{**defaults, **options})


def ids(folder: Path, text: str) -> list[int]:
    return [0, *AutoTokenizer.from_pretrained(folder).encode(text, add_special_tokens=False)]


def metric(server: Server, name: str) -> float:
    """A value of /metrics, such as `cbtm_generations_total{end="hangup"}`."""
    headers = {"Authorization": f"Bearer {server.key}"}
    with urllib.request.urlopen(urllib.request.Request(f"{server.url}/metrics", headers=headers)) as reply:
        rows = dict(line.rsplit(" ", 1) for line in reply.read().decode().splitlines() if line[0] != "#")
    return float(rows.get(name, 0))


def wait_for(happened: Callable[[], bool]) -> None:
    until = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < until, "it has not happened within a minute"
        time.sleep(0.02)


def post(server: Server, path: str, body: bytes, **headers: str) -> tuple[int, dict[str, Any]]:
    """Status and error of a request by hand."""
    headers = {"Content-Type": "application/json", **headers}
    request = urllib.request.Request(server.url + path, body, headers)
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request)
    with caught.value as reply:
        return reply.code, json.loads(reply.read())["error"]


@contextlib.contextmanager
def by_socket(server: Server, body: dict[str, Any]) -> Iterator[socket.socket]:
    """A request that was sent, and whose answer nobody has read. Leaving the context hangs up."""
    address, content = urlsplit(server.url), json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {address.netloc}\r\nContent-Type: application/json\r\n"
    with socket.create_connection((address.hostname, address.port)) as connection:
        connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
        yield connection


def test_a_completion_is_what_the_model_generates(server: Server, folder: Path, model: Any) -> None:
    prompt = torch.tensor([ids(folder, PROMPT)])
    expected = model.generate(prompt, do_sample=False, max_new_tokens=20)[0, prompt.shape[1] :].tolist()
    reply = complete(server, max_tokens=20, logprobs=0)
    assert token_ids(folder, reply.choices[0].logprobs.tokens) == expected
    assert reply.choices[0].finish_reason == "length" and reply.object == "text_completion"
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (prompt.shape[1] - 1, 20)
    assert reply.usage.expert_passes >= 2 * (prompt.shape[1] + 19)  # two of three experts run for each token
    by_ids = complete(server, max_tokens=20, prompt=prompt[0].tolist())
    assert by_ids.choices[0].text == reply.choices[0].text


def token_ids(folder: Path, names: list[str]) -> list[int]:
    """The tokens with these names in lists of log-probabilities."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    by_name = {}
    for token, i in tokenizer.get_vocab().items():
        text = tokenizer.decode([i])
        by_name.setdefault(token if "\ufffd" in text else text, i)
    known = {f"\\x{byte:02x}": character for byte, character in bytes_to_unicode().items()}
    return [
        by_name["".join(known[x] for x in re.findall(r"\\x..", name)) if name[:6] == "bytes:" else name]
        for name in names
    ]


def test_an_empty_key_in_the_environment_is_none_on_this_machine_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CBTM_API_KEY", "")
    assert serve.read_key(None, "127.0.0.1") is None
    with pytest.raises(ValueError, match=r"^CBTM_API_KEY: empty"):
        serve.read_key(None, "0.0.0.0")


def test_the_description_of_the_api_has_the_version_of_the_package(server: Server) -> None:
    with urllib.request.urlopen(f"{server.url}/openapi.json") as reply:
        assert json.load(reply)["info"]["version"] == cbtm_pipeline.__version__


def test_a_stream_shows_the_same_text_as_it_comes(server: Server) -> None:
    whole = complete(server, max_tokens=30, temperature=1, seed=7, n=2)
    stream = complete(
        server, max_tokens=30, temperature=1, seed=7, n=2, stream=True, stream_options={"include_usage": True}
    )
    texts, finish, chunks = ["", ""], {}, list(stream)
    for chunk in chunks[:-1]:
        (choice,) = chunk.choices
        texts[choice.index] += choice.text
        finish[choice.index] = choice.finish_reason
    assert texts == [choice.text for choice in whole.choices]
    assert finish == {0: "length", 1: "length"}
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    assert len(chunks) > 30, "a stream has more than one chunk"


def test_a_seed_gives_the_same_answer_alone_and_among_others(server: Server) -> None:
    alone = complete(server, max_tokens=20, temperature=1, seed=3, prompt="rose soil").choices[0].text
    reply = complete(server, max_tokens=20, temperature=1, seed=3, n=3, prompt=["rose soil", "butter"])
    assert [choice.index for choice in reply.choices] == list(range(6))
    assert reply.choices[0].text == alone
    assert len({choice.text for choice in reply.choices}) == 6
    assert complete(server, max_tokens=20, temperature=1, seed=4, prompt="rose soil").choices[0].text != alone


def test_log_probabilities_are_the_models(server: Server, folder: Path, model: Any) -> None:
    prompt = ids(folder, "ship anchor mast sail captain tide deck rope " * 60)[:700]  # several blocks
    reply = complete(server, prompt=prompt, max_tokens=8, logprobs=3, echo=True)
    found = reply.choices[0].logprobs
    whole = prompt + token_ids(folder, found.tokens[len(prompt) :])
    expected = model(torch.tensor([whole[:-1]])).logits[0]
    assert found.token_logprobs[0] is None and found.top_logprobs[0] is None
    exact = expected.gather(1, torch.tensor(whole[1:])[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(found.token_logprobs[1:]), exact, atol=2e-4, rtol=0)
    for entry, row in zip(found.top_logprobs[1:], expected, strict=True):
        assert sorted(entry.values())[-3:] == pytest.approx(sorted(row.topk(3).values.tolist()), abs=2e-4)
    text = reply.choices[0].text
    assert text.startswith("<|endoftext|>ship anchor") and found.text_offset[1] == len("<|endoftext|>")


def test_an_echo_without_new_tokens_scores_a_text(server: Server) -> None:
    reply = complete(server, prompt="butter flour", max_tokens=0, logprobs=1, echo=True)
    found = reply.choices[0].logprobs
    assert reply.choices[0].text == "butter flour" == "".join(found.tokens)
    assert None not in found.token_logprobs  # even the first token has the separator before it
    assert reply.usage.completion_tokens == 0


def test_router_weights_come_with_each_token(server: Server, folder: Path, model: Any) -> None:
    reply = complete(server, max_tokens=12, echo=True, extra_body={"router_weights": True})
    choice = reply.choices[0]
    assert "".join(token["token"] for token in choice.router_weights) == choice.text
    prompt = torch.tensor([ids(folder, PROMPT)])
    out = model.generate(prompt, do_sample=False, max_new_tokens=12)
    exact = model(out[:, :-1], output_router_weights=True).router_log_weights[0].exp()
    for token, row in zip(choice.router_weights, exact, strict=True):
        assert len(token["weights"]) == 2 and sum(token["weights"].values()) == pytest.approx(1, abs=1e-4)
        for name, weight in token["weights"].items():
            assert weight == pytest.approx(row[model.names.index(name)].item(), abs=1e-3)
    assert "router_weights" not in complete(server, max_tokens=1).choices[0].model_dump()


def test_a_stop_text_ends_the_answer_and_is_not_shown(server: Server) -> None:
    text = complete(server, max_tokens=60, temperature=1, seed=1).choices[0].text
    stop = text[20:24]
    expected = text[: text.index(stop)]
    options: dict[str, Any] = {"max_tokens": 60, "temperature": 1, "seed": 1, "stop": ["\0none", stop]}
    reply = complete(server, **options, logprobs=0)
    assert reply.choices[0].text == expected and reply.choices[0].finish_reason == "stop"
    assert reply.usage.completion_tokens < 60
    assert max(reply.choices[0].logprobs.text_offset) < len(expected)
    stream = complete(server, **options, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == expected


def test_the_separator_ends_an_answer(server: Server) -> None:
    """At the highest temperature, id 0 comes up soon in one of many answers."""
    reply = complete(server, max_tokens=400, temperature=2, n=16, seed=0)
    ended = [choice for choice in reply.choices if choice.finish_reason == "stop"]
    assert ended and all("<|endoftext|>" not in choice.text for choice in reply.choices)


def test_a_chat_without_a_template_is_written_as_turns(server: Server) -> None:
    messages: Any = [{"role": "system", "content": "Cook."}, {"role": "user", "content": "Rye?"}]
    reply: Any = server.client().chat.completions.create(
        model="ensemble", messages=messages, max_tokens=10, temperature=0, logprobs=True, top_logprobs=2
    )
    assert reply.choices[0].message.role == "assistant"
    text = complete(server, prompt="system: Cook.\nuser: Rye?\nassistant:", max_tokens=10).choices[0].text
    assert reply.choices[0].message.content == text
    content = reply.choices[0].logprobs.content
    assert len(content) == 10 and all(len(token.top_logprobs) == 2 for token in content)
    assert bytes(byte for token in content for byte in token.bytes).decode(errors="replace") == text
    assert content[0].logprob == content[0].top_logprobs[0].logprob
    stream: Any = server.client().chat.completions.create(
        model="ensemble", messages=messages, max_completion_tokens=10, temperature=0, stream=True
    )
    deltas = [chunk.choices[0].delta for chunk in stream]
    assert deltas[0].role == "assistant"
    assert "".join(delta.content or "" for delta in deltas) == text


def test_a_chat_uses_the_tokenizers_template(tmp_path: Path) -> None:
    ensemble = made_server.write_ensemble(tmp_path, chat_template=made_server.TEMPLATE)
    with made_server.serving(ensemble, tmp_path / "log") as server:
        chat = server.client().chat.completions

        def say(role: str) -> Any:
            messages: Any = [{"role": role, "content": [{"type": "text", "text": "Rye?"}]}]
            return chat.create(model="ensemble", messages=messages, max_tokens=5, temperature=0)

        text = complete(server, prompt="[user] Rye?\n[assistant]", max_tokens=5).choices[0].text
        assert say("user").choices[0].message.content == text
        with pytest.raises(openai.BadRequestError, match="no system"):
            say("system")


def test_another_model_is_not_found(server: Server) -> None:
    with pytest.raises(openai.NotFoundError, match=r"'gpt-4'. Expected 'ensemble'") as caught:
        complete(server, model="gpt-4")
    assert caught.value.code == "model_not_found" and caught.value.param == "model"
    with pytest.raises(openai.NotFoundError):
        server.client().models.retrieve("gpt-4")
    (found,) = server.client().models.list()
    assert found.id == "ensemble" == server.client().models.retrieve("ensemble").id
    assert [expert["name"] for expert in found.experts] == ["kitchen", "harbour", "garden"]  # pyright: ignore
    assert found.experts[0]["terms"][:2] == ["butter", "flour"]  # pyright: ignore


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"prompt": "butter " * 2000}, r"prompt: \d{4} tokens. Expected at most 1000"),
        ({"prompt": [1] * 900, "max_tokens": LONG}, r"Expected at most 4096 tokens for 900 of the prompt"),
        ({"prompt": ""}, None),
        ({"prompt": [[]]}, "prompt: empty"),
        ({"prompt": []}, "prompt: "),
        ({"prompt": [5, 320]}, "token id 320. Expected ids below 320"),
        ({"prompt": ["a", 5]}, "prompt: "),
        ({"prompt": ["a"] * 100, "n": 2}, "at most 128 answers"),
        ({"max_tokens": LONG + 1}, f"max_tokens: {LONG + 1}. Expected at most {LONG}"),
        ({"max_tokens": True}, "max_tokens: True. Expected a whole number"),
        ({"temperature": 2.1}, "temperature: 2.1. Expected a number from 0 to 2"),
        ({"extra_body": {"temprature": 1}}, "temprature: unknown. Expected a field such as temperature"),
        ({"frequency_penalty": 1}, "frequency_penalty: 1. Expected 0. Leave it out"),
        ({"frequency_penalty": 0, "user": "me", "logprobs": None, "best_of": 1}, None),
        ({"logprobs": 21}, "logprobs: 21"),
        ({"stop": [""]}, "stop: ''"),
        ({"n": 17}, "n: 17"),
        ({"seed": 0.5}, "seed: 0.5"),
    ],
)
def test_what_cannot_be_done_is_refused_in_one_line(server: Server, options: Any, found: str | None) -> None:
    if found is None:
        complete(server, **options)
        return
    with pytest.raises(openai.BadRequestError, match=found) as caught:
        complete(server, **options)
    message: Any = caught.value.body
    assert message["type"] == "invalid_request_error" and message["message"].count(". ") >= 2
    assert "\n" not in message["message"] and message["param"] in {*options, "temprature"}


@pytest.mark.parametrize(
    ("path", "body", "headers", "status"),
    [
        ("/v1/completions", b"{", {}, 400),
        ("/v1/completions", b"[" * 100_000, {}, 400),
        ("/v1/completions", b'{"model": "ensemble", "prompt": "a", "seed": ' + b"1" * 5000 + b"}", {}, 400),
        ("/v1/completions", b'{"model": "ensemble", "prompt": "a\\ud800"}', {}, 400),
        ("/v1/completions", b'{"model": "ensemble", "prompt": "a", "temperature": NaN}', {}, 400),
        ("/v1/completions", b'{"model": "ensemble"}', {"Content-Type": "text/plain"}, 400),
        ("/v1/completions", b'{"model": "ensemble", "prompt": "a"}', {"Host": "evil.example"}, 400),
        ("/v1/completions", b'"' + b"a" * (1 << 20) + b'"', {}, 413),
        ("/v1/completions", b'"' + b"a" * (5 << 20) + b'"', {}, 413),
        ("/v1/nothing", b"{}", {}, 404),
        ("/health", b"{}", {}, 405),
    ],
)
def test_a_broken_request_has_an_error_in_openais_form(
    server: Server, path: str, body: bytes, headers: dict[str, str], status: int
) -> None:
    found, error = post(server, path, body, **headers)
    assert found == status
    assert error.keys() == {"message", "type", "param", "code"} and "Expected" in error["message"]


def test_a_body_without_a_length_is_cut_off_too(server: Server) -> None:
    address = urlsplit(server.url)
    with socket.create_connection((address.hostname, address.port)) as connection:
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: {address.netloc}\r\nContent-Type: application/json\r\n"
        )
        connection.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode())
        with contextlib.suppress(ConnectionError):  # the server may have answered and closed before the end
            for _ in range(32):
                connection.sendall(b"10000\r\n" + b" " * 0x10000 + b"\r\n")
        assert connection.recv(64).startswith(b"HTTP/1.1 413 ")


def test_a_key_is_needed_where_one_was_set(guarded: Server) -> None:
    assert [model.id for model in guarded.client().models.list()] == ["mine"]
    for wrong in ("wrong", KEY + "x", KEY[:-1], KEY.upper()):
        with pytest.raises(openai.AuthenticationError, match="key: missing or wrong"):
            guarded.client(key=wrong).models.list()
    status, error = post(guarded, "/v1/completions", b"{}")
    assert status == 401 and error["code"] == "invalid_api_key"
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(f"{guarded.url}/metrics")
    with urllib.request.urlopen(f"{guarded.url}/health") as reply:
        assert json.loads(reply.read()) == {"status": "ok"}
    assert KEY not in guarded.log.read_text()


def test_fifty_at_once_all_get_an_answer(server: Server) -> None:
    expected = complete(server, max_tokens=10).choices[0].text
    with ThreadPoolExecutor(50) as pool:
        texts = list(pool.map(lambda _: complete(server, max_tokens=10).choices[0].text, range(50)))
    assert Counter(texts) == {expected: 50}


def test_fifty_at_once_get_an_answer_or_a_clean_429_where_there_is_little_room(guarded: Server) -> None:
    client = guarded.client()

    def ask(_: int) -> str:
        try:
            return (
                client.completions.create(model="mine", prompt="a", max_tokens=100, temperature=0)
                .choices[0]
                .text
            )
        except openai.RateLimitError as error:
            assert 1 <= int(error.response.headers["retry-after"]) <= 60 and error.code == "queue_full"
            return "429"

    with ThreadPoolExecutor(50) as pool:
        found = Counter(pool.map(ask, range(50)))
    n_refused = found.pop("429")
    assert 10 <= n_refused <= 40  # two run and eight wait
    assert list(found.values()) == [50 - n_refused]
    patient = guarded.client(max_retries=50)  # waits as Retry-After says
    with ThreadPoolExecutor(20) as pool:
        replies = pool.map(lambda _: patient.completions.create(model="mine", prompt="a"), range(20))
        assert len(list(replies)) == 20


def test_a_client_that_hangs_up_stops_its_generation(server: Server) -> None:
    hung_up = 'cbtm_generations_total{end="hangup"}'
    n_before, n_tokens = metric(server, hung_up), metric(server, "cbtm_generated_tokens_total")
    stream = complete(server, max_tokens=LONG, stream=True)
    for _ in range(3):
        next(stream)
    stream.close()
    wait_for(lambda: metric(server, hung_up) == n_before + 1)
    body = {"model": "ensemble", "prompt": "a", "max_tokens": LONG, "temperature": 0}
    with by_socket(server, body):
        wait_for(lambda: metric(server, "cbtm_running") == 1)
    wait_for(lambda: metric(server, hung_up) == n_before + 2)
    assert metric(server, "cbtm_running") == 0
    assert 3 <= metric(server, "cbtm_generated_tokens_total") - n_tokens < 2 * LONG
    assert metric(server, 'cbtm_requests_total{path="/v1/completions",status="499"}') >= 1


def test_metrics_count_what_was_done(server: Server) -> None:
    names = (
        "cbtm_generated_tokens_total",
        "cbtm_prompt_tokens_total",
        'cbtm_generations_total{end="done"}',
        'cbtm_requests_total{path="/v1/completions",status="200"}',
        "cbtm_time_to_first_token_seconds_count",
        "cbtm_tokens_per_second_count",
    )
    before = [metric(server, name) for name in names]
    complete(server, prompt=[1, 2, 3], max_tokens=5)
    assert [metric(server, name) - n for name, n in zip(names, before, strict=True)] == [5, 3, 1, 1, 1, 1]
    assert 2 <= metric(server, "cbtm_expert_passes_per_token") <= 3
    assert metric(server, "cbtm_queue_length") == 0
    by_expert = sum(
        metric(server, f'cbtm_generated_tokens_by_expert_total{{expert="{name}"}}')
        for name in ("kitchen", "harbour", "garden")
    )
    assert by_expert == metric(server, "cbtm_generated_tokens_total")


def test_time_is_bounded_in_the_queue_and_outside(folder: Path, tmp_path: Path) -> None:
    options = ("--timeout-s", "1", "--concurrency", "1", "--max-tokens", str(LONG))
    with made_server.serving(folder, tmp_path / "log", *options) as server, ThreadPoolExecutor(4) as pool:
        replies = [pool.submit(complete, server, max_tokens=LONG) for _ in range(4)]
        wait_for(lambda: all(reply.done() for reply in replies))
        done = [reply.result() for reply in replies if reply.exception() is None]
        late = [reply.exception() for reply in replies if reply.exception() is not None]
        assert done and late
        for reply in done:
            assert reply.choices[0].finish_reason == "length" and 0 < reply.usage.completion_tokens < LONG
        for error in late:
            assert isinstance(error, openai.InternalServerError) and error.status_code == 503
            assert error.code == "timeout" and "retry-after" in error.response.headers


def test_sigterm_finishes_what_runs_and_refuses_what_waits(folder: Path, tmp_path: Path) -> None:
    options = ("--concurrency", "1", "--max-tokens", str(LONG))
    with made_server.serving(folder, tmp_path / "log", *options) as server, ThreadPoolExecutor(1) as pool:
        stream = complete(server, max_tokens=500, stream=True, stream_options={"include_usage": True})
        chunks = [next(stream)]
        waiting = pool.submit(complete, server, max_tokens=1)
        wait_for(lambda: metric(server, "cbtm_queue_length") == 1)
        server.process.send_signal(signal.SIGTERM)
        error = waiting.exception(60)
        assert isinstance(error, openai.InternalServerError) and error.status_code == 503
        chunks += stream
        assert chunks[-1].usage.completion_tokens == 500
        assert server.process.wait(60) == 0
    assert "Traceback" not in server.log.read_text()


def test_a_second_signal_ends_at_once(folder: Path, tmp_path: Path) -> None:
    with made_server.serving(folder, tmp_path / "log", "--max-tokens", str(LONG)) as server:
        stream = complete(server, max_tokens=LONG, stream=True)
        chunks = [next(stream)]
        server.process.send_signal(signal.SIGINT)
        wait_for(lambda: "stopping" in server.log.read_text())
        server.process.send_signal(signal.SIGINT)
        chunks += stream
        assert server.process.wait(60) == 0
        assert chunks[-1].choices[0].finish_reason == "length" and len(chunks) < LONG


def run(*arguments: str | Path, **environment: str) -> str:
    """What the command prints before it fails."""
    done = subprocess.run(
        made_server.command(*arguments),
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=120,
    )
    assert done.returncode == 1 and done.stdout == ""
    return done.stderr


def test_a_bad_start_is_one_line(folder: Path, tmp_path: Path) -> None:
    model = ("--model", folder)
    (tmp_path / "empty").mkdir()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        cases: list[tuple[str, str]] = [
            (run("--outdir", tmp_path), "ensemble: no ensemble. Expected files.json"),
            (run("--model", tmp_path / "empty"), "no ensemble"),
            (run("--model", folder / "experts/garden"), "garden: one model (llama). Expected an ensemble."),
            (run(*model, "--host", "0.0.0.0"), "--host: 0.0.0.0 without a key"),
            (run(*model, "--host", "0.0.0.0", CBTM_API_KEY=""), "CBTM_API_KEY: empty"),
            (run(*model, "--api-key", ""), "CBTM_API_KEY: empty"),
            (run(*model, "--api-key", "a b"), "CBTM_API_KEY: empty, or with other characters"),
            (run(*model, "--port", port), f"127.0.0.1 port {port}: Address already in use"),
            (run(*model, "--port", "70000"), "--port: '70000'. Expected a whole number from 0 to 65535"),
            (run(*model, "--port", "http"), "--port: 'http'. Expected a whole number from 0 to 65535"),
            (run(*model, "--concurrency", "0"), "--concurrency: '0'. Expected a whole number from 1 to 1000"),
            (run(*model, "--timeout-s", "nan"), "--timeout-s: 'nan'"),
            (run(*model, "--host", "no.invalid", "--api-key", "k"), "no.invalid port 8000"),
        ]
    for printed, found in cases:
        assert found in printed and printed.count("\n") == 1, printed


def test_a_damaged_expert_is_found_at_the_start(tmp_path: Path) -> None:
    folder = made_server.write_ensemble(tmp_path)
    path = folder / "experts/garden/model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.unlink()  # a hard link
    path.write_bytes(content)
    printed = run("--model", folder)
    assert "model.safetensors: another file than it was" in printed and printed.count("\n") == 1


def test_a_missing_extra_is_one_line_with_the_command_to_type(folder: Path) -> None:
    code = "import sys; sys.modules['uvicorn'] = None; from cbtm_pipeline import __main__ as m; m.main()"
    arguments = [sys.executable, "-c", code, "serve", "--model", str(folder)]
    done = subprocess.run(arguments, capture_output=True, text=True)
    assert done.returncode == 1
    expected = "uvicorn not installed. Expected the extra serve. Run pip install 'cbtm-pipeline[serve]'.\n"
    assert done.stderr == f"cbtm serve: {expected}"
