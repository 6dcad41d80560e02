"""Pictures of TensorBoard and of the segmented texts: `python docs/make_screenshots.py runs/NAME`.

Needs Chromium and a Chinese font (`apt install chromium fonts-wqy-zenhei`). Writes docs/images/*.png. Look at them
before they are committed.
"""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

IMAGES = Path(__file__).parent / "images"
PAGES = {"tensorboard": ("?darkMode=false&forceSVG=true#timeseries", "1500,1150"),
         "custom_scalars": ("#custom_scalars", "1500,1500")}
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
         "--virtual-time-budget=60000")
START_SECONDS = 120


def shoot(url: str, size: str, to: Path) -> None:
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
    with tempfile.TemporaryDirectory() as profile:
        subprocess.run([browser, *FLAGS, f"--user-data-dir={profile}", f"--window-size={size}", f"--screenshot={to}",
                        url],
                       check=True, stderr=subprocess.DEVNULL, timeout=300)


def main(run: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    IMAGES.mkdir(exist_ok=True)
    server = subprocess.Popen([sys.executable, "-m", "tensorboard.main", "--logdir", str(run.parent), "--port",
                               str(port)],
                              stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + START_SECONDS
        while f'"{run.name}"' not in _get(f"http://localhost:{port}/data/runs"):
            if time.monotonic() > deadline:
                raise TimeoutError("TensorBoard does not show the run")
            time.sleep(1)
        time.sleep(5)  # the rest of its events
        for name, (place, size) in PAGES.items():
            shoot(f"http://localhost:{port}/{place}", size, IMAGES / f"{name}.png")
    finally:
        server.terminate()
        server.wait()
    shoot((run / "boundaries.html").resolve().as_uri(), "1000,900", IMAGES / "boundaries.png")


def _get(url: str) -> str:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return str(answer.read().decode())
    except OSError:
        return ""


if __name__ == "__main__":
    main(Path(sys.argv[1]))
