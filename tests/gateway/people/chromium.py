"""A real browser without a screen, used by its keyboard alone."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.wait import WebDriverWait

PATIENCE = 30.0
"""Seconds for whatever a page does."""
_MOST_STEPS = 80


class Keyboard:
    """Somebody at the keyboard of a browser.

    ``steps`` has for each press of Tab what got the focus: on which site, what it is called, whether the focus is visible.
    """

    def __init__(self, driver: Chrome) -> None:
        self.driver = driver
        self.steps: list[tuple[str, str, bool]] = []

    def press(self, *keys: str) -> None:
        ActionChains(self.driver).send_keys(*keys).perform()

    def tab_to(self, called: str) -> None:
        """Press Tab until something of this name has the focus, from where it is now.

        :raises AssertionError: it cannot be reached so.
        """
        seen: deque[str] = deque(maxlen=20)
        for _ in range(_MOST_STEPS):
            self.press(Keys.TAB)
            step = self._focus()
            self.steps.append(step)
            seen.append(step[1])
            if step[1] == called:
                return
        raise AssertionError(f"no Tab leads to {called!r}, but to {list(seen)}")

    def use(self, called: str, key: str = Keys.ENTER) -> None:
        """Tab to something and press Enter, and wait for the page that comes of it."""
        self.tab_to(called)
        before = self.driver.find_element(By.TAG_NAME, "html")
        self.press(key)
        WebDriverWait(self.driver, PATIENCE, poll_frequency=0.05).until(lambda driver: _has_gone(before))

    def _focus(self) -> tuple[str, str, bool]:
        site, visible = self.driver.execute_script(
            """const it = document.activeElement, style = getComputedStyle(it), box = it.getBoundingClientRect();
            return [location.origin, it === document.body ||
                style.outlineStyle !== "none" && parseFloat(style.outlineWidth) >= 2 && box.width > 0 && box.height > 0]"""
        )
        return site, self.driver.switch_to.active_element.accessible_name, visible

    def await_text(self, text: str) -> None:
        """Wait until the page has a text."""

        def there(driver: Any) -> bool:
            return text in driver.find_element(By.TAG_NAME, "body").text

        WebDriverWait(self.driver, PATIENCE, poll_frequency=0.1, ignored_exceptions=[Exception]).until(
            there, f"{text!r} does not come"
        )

    @property
    def text(self) -> str:
        """What is on the page."""
        return str(self.driver.find_element(By.TAG_NAME, "body").text)


def _has_gone(element: Any) -> bool:
    from selenium.common.exceptions import StaleElementReferenceException, WebDriverException

    try:
        element.is_enabled()
    except StaleElementReferenceException:
        return True
    except WebDriverException:  # In the middle of a navigation.
        return False
    return False


@contextmanager
def chromium(folder: Path) -> Iterator[Keyboard]:
    """Start Debian's Chromium, with a profile of its own in ``folder``."""
    options = ChromeOptions()
    options.binary_location = "/usr/bin/chromium"
    for argument in (
        "--headless=new",
        "--no-sandbox",  # Which does not work for root; the pages are our own.
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--disable-background-networking",
        "--no-first-run",
        "--no-proxy-server",
        "--ignore-certificate-errors",  # Those of the tests sign themselves.
        "--window-size=1100,900",
        f"--user-data-dir={folder / 'profile'}",
    ):
        options.add_argument(argument)
    downloads = folder / "downloads"
    downloads.mkdir()
    options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
    driver = Chrome(options=options, service=Service("/usr/bin/chromedriver"))
    try:
        driver.set_page_load_timeout(PATIENCE)
        yield Keyboard(driver)
    finally:
        driver.quit()


class Elsewhere:
    """Another site, on a free port of 127.0.0.1: it has one page, and writes down what is asked of it; a context manager."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.page = ""
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.asked.append(self.path)
                content = outer.page.encode()
                self.send_response(200)
                self.send_header("Content-Type", "text/html; charset=utf-8")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, format: str, *args: Any) -> None:
                """What is asked is in ``asked``."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    def __enter__(self) -> Elsewhere:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(timeout=10)
