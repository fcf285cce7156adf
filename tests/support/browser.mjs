// Opens a page of examples/javascript in Chromium, draws what a task (JSON on stdin) asks for, and prints what the page shows.

import { createRequire } from "node:module";

const task = JSON.parse(await new Response(process.stdin).text());
const { chromium } = createRequire(`${task.example}/package.json`)("playwright-core");
const args = [
  "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
  "--disable-component-update", "--disable-sync", ...(task.flags ?? []),
];
const browser = await chromium.launch({ executablePath: task.browser, args });
try {
  const page = await browser.newPage({ viewport: task.viewport ?? { width: 1000, height: 700 } });
  page.setDefaultTimeout(task.timeout ?? 100_000);
  const requests = [];
  page.on("request", (request) => requests.push(request.url()));
  for (const [pattern, body] of Object.entries(task.replaced ?? {})) {
    await page.route(pattern, (route) => route.fulfill(body === null ? { status: 404 } : { body: Buffer.from(body, "base64") }));
  }
  await page.goto(task.url);
  /** Waits until the page can draw again or shows an error, and returns the error. */
  const settled = async () => {
    await page.locator("button:enabled, #error:visible").first().waitFor();
    return (await page.locator("#error").isVisible()) ? page.locator("#error").innerText() : null;
  };
  const result = { error: await settled(), status: await page.locator("#status").innerText(), images: [], requests };
  for (const fields of result.error ? [] : task.draws) {
    for (const [name, value] of Object.entries(fields)) await page.locator(`[name=${name}]`).fill(value);
    await page.locator("button").click();
    result.error = await settled();
    if (result.error) break;
    const png = await page.locator("canvas").evaluate((canvas) => canvas.toDataURL("image/png").split(",")[1]);
    const times = await page.locator("tr").evaluateAll((rows) => rows.map((row) => [...row.cells].map((cell) => cell.innerText)));
    result.images.push({ png, times: Object.fromEntries(times), status: await page.locator("#status").innerText() });
  }
  result.overflow = await page.evaluate(() => document.documentElement.scrollWidth - document.documentElement.clientWidth);
  if (task.screenshot) await page.screenshot({ path: task.screenshot });
  console.log(JSON.stringify(result));
} finally {
  await browser.close();
}
