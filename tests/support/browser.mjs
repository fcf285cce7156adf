// Opens a page of examples/javascript in Chromium, draws what a JSON document on stdin asks for, and prints what the page shows.

import { createRequire } from "node:module";

const task = JSON.parse(await new Response(process.stdin).text());
const { chromium } = createRequire(`${task.example}/package.json`)("playwright-core");
const args = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
  "--disable-component-update", "--disable-sync", ...(task.flags ?? [])];
const browser = await chromium.launch({ executablePath: task.browser, args });
try {
  const page = await browser.newPage({ viewport: task.viewport ?? { width: 1000, height: 700 } });
  page.setDefaultTimeout(task.timeout ?? 100_000);
  for (const [pattern, body] of Object.entries(task.replaced ?? {})) {
    await page.route(pattern, (route) => (body === null ? route.fulfill({ status: 404 }) : route.fulfill({ body: Buffer.from(body, "base64") })));
  }
  const requests = [];
  page.on("request", (request) => requests.push([request.url(), request.headers().range ?? null]));
  const outside = [];
  page.on("request", (request) => request.url().startsWith(new URL(task.url).origin) || request.url().startsWith("data:") || request.url().startsWith("blob:") || outside.push(request.url()));
  await page.goto(task.url);
  const done = async () => {
    await page.locator("button:enabled, #error:visible").first().waitFor();
    return (await page.locator("#error").isVisible()) ? page.locator("#error").innerText() : null;
  };
  const result = { error: await done(), status: await page.locator("#status").innerText(), images: [], requests, outside };
  for (const fields of result.error ? [] : task.draws) {
    for (const [name, value] of Object.entries(fields)) await page.locator(`[name=${name}]`).fill(String(value));
    await page.locator("button").click();
    await page.locator("button:disabled").waitFor({ timeout: 2000 }).catch(() => {});
    result.error = await done();
    if (result.error) break;
    const png = await page.locator("canvas").evaluate((canvas) => canvas.toDataURL("image/png"));
    const times = await page.locator("tr").evaluateAll((rows) => rows.map((row) => [...row.cells].map((cell) => cell.innerText)));
    result.images.push({ png: png.split(",")[1], times: Object.fromEntries(times), status: await page.locator("#status").innerText() });
  }
  result.overflow = await page.evaluate(() => document.documentElement.scrollWidth - document.documentElement.clientWidth);
  if (task.screenshot) await page.screenshot({ path: task.screenshot });
  console.log(JSON.stringify(result));
} finally {
  await browser.close();
}
