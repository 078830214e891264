() => {
  const faults = [];
  const seen = (element) => element.checkVisibility({ opacityProperty: true, visibilityProperty: true }) && element.getClientRects().length > 0;
  const parse = (colour) => (colour.match(/[\d.]+/g) ?? [0, 0, 0, 0]).map(Number);
  const over = ([r, g, b, a = 1], below) => [r, g, b].map((channel, i) => channel * a + below[i] * (1 - a));
  const luminance = (colour) => {
    const [r, g, b] = colour.map((value) => value / 255).map((value) => (value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const background = (element) => {
    const layers = [];
    for (let one = element; one; one = one.parentElement) layers.unshift(parse(getComputedStyle(one).backgroundColor));
    return layers.reduce((below, layer) => over(layer, below), [0, 0, 0]);
  };
  const contrast = (one, other) => {
    const [high, low] = [luminance(one), luminance(other)].sort((a, b) => b - a);
    return (high + 0.05) / (low + 0.05);
  };
  const place = (element) => `${element.tagName.toLowerCase()}${element.id ? `#${element.id}` : ""}.${element.className?.baseVal ?? element.className}`;

  // Text against what lies behind it: WCAG 2.2, 1.4.3, AA.
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || !seen(element) || element.closest(":disabled, .unseen, noscript, script, option")) continue;
    const behind = background(element);
    const style = getComputedStyle(element);
    const ratio = contrast(over(parse(style.color), behind), behind);
    const large = parseFloat(style.fontSize) >= 24 || (parseFloat(style.fontSize) >= 18.66 && Number(style.fontWeight) >= 700);
    if (ratio < (large ? 3 : 4.5)) faults.push(`contrast ${ratio.toFixed(2)}: ${place(element)} "${walker.currentNode.data.trim().slice(0, 30)}"`);
  }

  // Borders of fields against what lies behind them: 1.4.11.
  for (const field of document.querySelectorAll("input, select, textarea")) {
    if (!seen(field) || field.disabled || field.type === "range" || field.type === "checkbox") continue;
    const behind = background(field.parentElement);
    const ratio = contrast(over(parse(getComputedStyle(field).borderTopColor), behind), behind);
    if (ratio < 3) faults.push(`border ${ratio.toFixed(2)}: ${place(field)}`);
  }

  // Every control has a name: 4.1.2; every picture words or a sign that it needs none: 1.1.1.
  const nameOf = (element) => element.getAttribute("aria-label") || (element.labels && [...element.labels].map((label) => label.textContent).join(""))
    || element.textContent || element.title;
  for (const control of document.querySelectorAll("button, a[href], input:not([hidden]), select, textarea, [role=img], summary")) {
    if (seen(control) && !nameOf(control).trim()) faults.push(`no name: ${place(control)}`);
  }
  for (const picture of document.querySelectorAll("img:not([alt])")) faults.push(`no alt: ${place(picture)}`);
  for (const svg of document.querySelectorAll("svg")) if (!svg.closest("[aria-hidden]")) faults.push(`svg that is read: ${place(svg)}`);

  // Targets are large enough: 2.5.8.
  for (const control of document.querySelectorAll("button, select, input:not([type=file], [hidden])")) {
    const box = control.getBoundingClientRect();
    const around = control.closest("label")?.getBoundingClientRect() ?? box;
    if (seen(control) && (around.width < 24 || around.height < 24) && control.type !== "range") faults.push(`small: ${place(control)} ${box.width} x ${box.height}`);
  }

  const ids = [...document.querySelectorAll("[id]")].map((element) => element.id);
  for (const id of new Set(ids.filter((one, i) => ids.indexOf(one) !== i))) faults.push(`two of #${id}`);
  for (const element of document.querySelectorAll("[aria-describedby], [aria-labelledby], [aria-controls], label[for]")) {
    for (const name of ["aria-describedby", "aria-labelledby", "aria-controls", "for"]) {
      for (const id of (element.getAttribute(name) ?? "").split(" ").filter(Boolean)) if (!document.getElementById(id)) faults.push(`${name} names no element: ${id}`);
    }
  }
  if ([...document.querySelectorAll("main")].filter(seen).length > 1) faults.push("more than one main");
  if (!document.documentElement.lang || !document.title) faults.push("no language or title");
  if (document.documentElement.scrollWidth > innerWidth + 1) faults.push(`wider than the window: ${document.documentElement.scrollWidth} > ${innerWidth}`);
  return faults;
}
