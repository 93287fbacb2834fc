"""`elision serve --demo` from nothing: the command, the `openai` client, the page in a headless browser."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest

from elision.serving.bench.upstream import ScriptedUpstream
from elision.serving.semantic.config import ServeConfig
from elision.serving.semantic.policies import checked
from elision.serving.semantic.proxy.admin import Grant
from elision.serving.semantic.proxy.app import Proxy
from elision.serving.semantic.proxy.server import running

from .test_proxy import CONFIG


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[object]:
    webdriver = pytest.importorskip("selenium.webdriver")
    chrome, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chrome is None or driver is None:
        pytest.skip("chromium and chromium-driver are not installed (Debian packages)")
    options = webdriver.ChromeOptions()
    options.binary_location = chrome
    for flag in [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--disable-dev-shm-usage",
        "--window-size=1120,1000",
    ]:
        options.add_argument(flag)
    options.add_argument(f"--user-data-dir={tmp_path / 'profile'}")
    it = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield it
    it.quit()


def until(check, seconds: float = 15.0) -> None:
    end = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < end, "the page did not show it in time"
        time.sleep(0.1)


def cell(browser, category: str, column: int) -> str:
    """A cell of the table, read in one go: the page replaces its rows every second."""
    script = """
        const rows = [...document.querySelectorAll("#categories tbody tr")];
        const row = rows.find(tr => tr.cells[0].textContent.startsWith(arguments[0]));
        return row ? row.cells[arguments[1] - 1].textContent : "";
    """
    return browser.execute_script(script, category, column)


def test_dashboard_shows_hits_savings_and_reports(browser) -> None:
    import hashlib

    upstream = ScriptedUpstream(delay=0.05)
    token = "a-token-for-the-test"
    with running(upstream.app) as up:
        grants = [Grant(hashlib.sha256(token.encode()).digest(), None)]
        proxy = Proxy(up, checked(ServeConfig, CONFIG, "config"), grants=grants)
        with running(proxy.app) as url:

            def ask(text: str) -> httpx.Response:
                body = {"model": "<b>m</b>", "messages": [{"role": "user", "content": text}]}
                return httpx.post(
                    f"{url}/v1/chat/completions", json=body, headers={"authorization": "Bearer k"}, timeout=20
                )

            browser.get(f"{url}/dashboard")
            until(lambda: "locked" in browser.find_element("id", "state").text)
            assert browser.find_element("id", "login").is_displayed()
            browser.find_element("id", "token").send_keys("wrong")
            browser.find_element("css selector", "#form button").click()
            time.sleep(0.3)
            assert not browser.find_element("id", "page").is_displayed()
            browser.get("about:blank")
            browser.get(f"{url}/dashboard#token={token}")
            until(lambda: "live" in browser.find_element("id", "state").text)
            assert token not in browser.current_url
            for _ in range(3):
                entry = ask("what is the weather like").headers.get("x-elision-entry", "")
            ask("completely other words here")
            until(lambda: cell(browser, "default", 3) == "2")
            assert browser.find_element("id", "rate").text == "50.0 %"
            assert float(browser.find_element("id", "saved").text) >= 0.1
            assert cell(browser, "default", 5) == "2"
            assert (
                httpx.post(f"{url}/elision/report", content=entry, headers={"authorization": "Bearer k"}).status_code
                == 204
            )
            until(lambda: cell(browser, "default", 11) == "1")
            assert "(off)" in browser.find_element("id", "categories").text
            # Names that callers choose are text, never markup.
            assert "<b>m</b>" in browser.find_element("id", "economics").text
            shot = os.environ.get("ELISION_SCREENSHOT")
            if shot:
                browser.save_screenshot(shot)
            errors = [
                line
                for line in browser.get_log("browser")
                if line["level"] == "SEVERE" and "401" not in line["message"]
            ]
            assert not errors


@pytest.mark.slow
def test_demo_from_nothing() -> None:
    """The command alone; the same thing asked three ways, streaming and not: the second and third answers are hits."""
    command = [sys.executable, "-m", "elision.serving", "--demo", "--port", "0"]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env)
    try:
        assert process.stderr is not None
        lines = []
        while not (lines and "try:" in lines[-1]):
            line = process.stderr.readline()
            assert line, f"the demo ended: {lines}"
            lines.append(line)
        base = re.search(r"(http://127\.0\.0\.1:\d+)/v1", "".join(lines))[1]
        until(lambda: httpx.get(f"{base}/health").json()["status"] == "ok", 60)
        client = openai.OpenAI(base_url=f"{base}/v1", api_key="any", timeout=120, max_retries=0)
        ask = client.chat.completions.with_raw_response.create
        said, heads = [], []
        for text, stream in (
            ("What is the capital of France?", False),
            ("what's the capital of France", True),
            ("Tell me: what is the capital of France?", False),
        ):
            raw = ask(
                model="smollm2-135m-instruct",
                messages=[{"role": "user", "content": text}],
                stream=stream,
                max_tokens=60,
            )
            reply = raw.parse()
            said.append(
                "".join(c.choices[0].delta.content or "" for c in reply) if stream else reply.choices[0].message.content
            )
            heads.append((raw.headers["x-elision-cache"], raw.headers["x-elision-category"]))
        assert heads[0][0] == "miss"
        assert [h[0] for h in heads[1:]] == ["hit", "hit"], heads
        assert "Paris" in said[0]
        assert said[0] == said[1] == said[2]
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) in (0, -signal.SIGINT, 130)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "either --upstream URL or --demo"),
        (["--upstream", "ftp://x"], "must start with http"),
        (["--upstream", "http://127.0.0.1:1", "--store", "mongo://x"], "--store: url = 'mongo://x'"),
    ],
)
def test_command_refuses_bad_options(arguments: list[str], message: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("encoder: {kind: hash}\nstore: {url: ':memory:'}\n")
    command = [sys.executable, "-m", "elision.serving", "--config", str(tmp_path / "c.yaml"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env={**os.environ, "COLUMNS": "300"})
    assert done.returncode == 2
    assert message in done.stderr


def test_command_names_wrong_policy_fields(tmp_path: Path) -> None:
    path = tmp_path / "policies.yaml"
    path.write_text("default: {treshold: 0.8}\ncategories:\n  code: {threshold: 1.7, ttl: soon}\nindex: 3\n")
    command = [
        sys.executable,
        "-m",
        "elision.serving",
        "--upstream",
        "http://127.0.0.1:1",
        "--config",
        str(path),
        "--check",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env={**os.environ, "COLUMNS": "300"})
    assert done.returncode == 2
    for text in ("treshold", "known fields here", "less than or equal to 1", "'soon' is no duration", "index = 3"):
        assert text in done.stderr, done.stderr


@pytest.mark.slow
def test_demo_model_goes_on_in_another_thread() -> None:
    """Each piece may be asked for by another thread of a pool; modes of torch belong to threads."""
    import threading
    from concurrent.futures import ThreadPoolExecutor

    from elision.serving.semantic.proxy.demo import Generator

    generator = Generator()
    prompt = generator.prompt([{"role": "user", "content": "What is the capital of France?"}])

    def begin():
        return generator(prompt, max_tokens=24, temperature=0.0, stop=threading.Event())

    alone = list(begin())
    handed_on, pieces = begin(), []
    while True:
        with ThreadPoolExecutor(1) as pool:
            piece = pool.submit(next, handed_on, None).result()
        if piece is None:
            break
        pieces.append(piece)
    assert pieces == alone
    assert "Paris" in "".join(text for text, _, _ in pieces)
    stop = threading.Event()
    stopped = generator(prompt, max_tokens=24, temperature=0.0, stop=stop)
    next(stopped)
    stop.set()
    assert len(list(stopped)) == 1
