"""The page of a run in headless Chromium, where it is installed: as wide as a phone, and as a screen."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from helpers.check_reports import failing_report
from helpers.run_folders import plan_yaml, write_csv

from mlu_lightning.reporting import read_run, run_page

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
QUIET = ["--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update"]
FRAMES = """<!DOCTYPE html><html><body>{frames}<pre id="found"></pre><script>
addEventListener("load", () => {{
  const measured = frame => {{
    const page = frame.contentDocument, images = [...page.images];
    return {{
      width: page.documentElement.scrollWidth,
      broken: images.filter(image => !image.naturalWidth).length,
      images: images.map(image => image.getBoundingClientRect().width),
      sideways: [...page.querySelectorAll("body *")]
        .filter(part => part.getBoundingClientRect().right > frame.clientWidth + 1 && !part.closest(".scroll, pre"))
        .map(part => part.outerHTML.slice(0, 80)),
    }};
  }};
  document.getElementById("found").textContent = JSON.stringify([...document.querySelectorAll("iframe")].map(measured));
}});
</script></body></html>"""


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
def test_it_fits_a_phone_and_a_screen(tmp_path: Path) -> None:
    run = tmp_path / ("a-folder-with-a-long-name-" * 4)
    write_csv(run / "metrics.csv", {step: 1 / (1 + step) for step in range(50)}, "train_loss")
    for number in range(12):
        write_csv(run / str(number) / "metrics.csv", {1: 0.5, 2: 1.0}, f"mlu/update/mlp/blocks.{number}.{'x' * 30}")
    (run / "plan.yaml").write_text(plan_yaml())
    (run / "check.json").write_text(failing_report(("a warning " * 30,)).to_json())
    (run / ("broken" * 20 + ".ckpt")).write_bytes(b"x")
    page = html.escape(run_page(read_run(run)), quote=True)
    widths = (390, 1280)
    frames = "".join(f'<iframe srcdoc="{page}" style="width: {width}px; border: 0"></iframe>' for width in widths)
    (tmp_path / "frames.html").write_text(FRAMES.format(frames=frames))
    options = ["--headless", "--no-sandbox", "--disable-gpu", *QUIET, f"--user-data-dir={tmp_path / 'user'}"]
    command = [str(CHROMIUM), *options, "--window-size=1400,1000", "--virtual-time-budget=5000", "--dump-dom"]
    dom = subprocess.run([*command, f"file://{tmp_path / 'frames.html'}"], capture_output=True, text=True, timeout=120)
    found = re.search('<pre id="found">(.*?)</pre>', dom.stdout)
    assert found is not None, dom.stderr
    for width, measured in zip(widths, json.loads(html.unescape(found[1])), strict=True):
        assert measured["width"] <= width and not measured["sideways"] and not measured["broken"], measured
        assert len(measured["images"]) >= 4 and all(300 <= image <= 480 for image in measured["images"]), measured
