"""Pictures of TensorBoard, segmented texts, generation and analysis: `python docs/make_screenshots.py runs/NAME`.

Needs Chromium and a Chinese font (`apt install chromium fonts-wqy-zenhei`). Writes docs/images/*.png. Look at them
before they are committed.
"""

from __future__ import annotations

import html
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from dlcm_lightning.inference.terminal import COLOURS

IMAGES = Path(__file__).parent / "images"
PAGES = {"tensorboard": ("?darkMode=false&forceSVG=true#timeseries", "1500,1150"),
         "custom_scalars": ("#custom_scalars", "1500,1500")}
PARTS = {"documents": "1100,930", "alignment": "1100,640"}
"""Of the page that `dlcm analyze` writes."""
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
         "--virtual-time-budget=60000")
START_SECONDS = 120
PROMPTS = ("The city of", "def area(", "If x", "曹操")
"""In `generate.png`, each with the concepts that it and its text fall into."""


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
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "generate.html"
        page.write_text(terminal(run), encoding="utf-8")
        shoot(page.as_uri(), "1000,430", IMAGES / "generate.png")
        report = Path(folder) / "analysis.html"
        subprocess.run([sys.executable, "-m", "dlcm_lightning", "analyze", str(run), "--out", str(report)], check=True)
        whole = report.read_text(encoding="utf-8")
        for part, size in PARTS.items():
            report.write_text(whole.replace("</head>", f"<style>header,section:not(#{part}){{display:none}}"
                                            "</style></head>"), encoding="utf-8")
            shoot(report.as_uri(), size, IMAGES / f"{part}.png")


def terminal(run: Path) -> str:
    """What `dlcm generate --concepts` writes to a terminal, as a page."""
    command = ["generate", str(run), "--concepts", "--seed", "1", "--max-tokens", "56"]
    command += [argument for prompt in PROMPTS for argument in ("--prompt", prompt)]
    done = subprocess.run([sys.executable, "-m", "dlcm_lightning", *command, "--color", "always"], check=True,
                          text=True, capture_output=True)
    levels = (0, 95, 135, 175, 215, 255)  # of the colour cube that terminals share
    text = html.escape(done.stdout + done.stderr.splitlines()[-1])
    for colour in COLOURS:
        red, green, blue = (levels[(colour - 16) // step % 6] for step in (36, 6, 1))
        text = text.replace(f"\x1b[30;48;5;{colour}m", f'<b style="background:rgb({red},{green},{blue})">')
    shown = " ".join(shlex.quote(one) for one in ["dlcm", *command])
    return (f'<meta charset="utf-8"><style>body{{margin:16px;background:#1b1b1f;color:#ddd;font:15px/1.5 monospace;'
            "white-space:pre-wrap}b{color:#000;font-weight:normal}</style>"
            f"$ {html.escape(shown)}\n{text.replace(chr(27) + '[0m', '</b>')}")


def _get(url: str) -> str:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return str(answer.read().decode())
    except OSError:
        return ""


if __name__ == "__main__":
    main(Path(sys.argv[1]))
