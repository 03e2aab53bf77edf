"""Makes docs/page.png, a picture of a run's page.

Needs Chromium and `pip install playwright`. Run it after scripts/demo:

    python scripts/page_picture.py runs/demo/tlens/page.html
"""

import argparse
import shutil
from pathlib import Path

from playwright.sync_api import sync_playwright

PICTURE = Path(__file__).parent.parent / "docs" / "page.png"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("page", type=Path)
    parser.add_argument(
        "--show", default="head=23.4&probe=france", help="what follows the # of a link"
    )
    parser.add_argument("--height", type=int, default=1040)
    args = parser.parse_args()
    with sync_playwright() as playwright:
        flags = ["--no-sandbox", "--disable-background-networking"]
        path = shutil.which("chromium")
        browser = playwright.chromium.launch(executable_path=path, args=flags)
        view = {"width": 1320, "height": args.height}
        page = browser.new_page(viewport=view, device_scale_factor=1.25)
        page.goto(f"{args.page.resolve().as_uri()}#{args.show}")
        page.wait_for_timeout(3000)
        page.screenshot(path=PICTURE)
        browser.close()
    print(PICTURE)


if __name__ == "__main__":
    main()
