// The losses of the page "Play with the losses": values and gradients by hand, then the drawing.
// A test compares the first part with the package.

// ---------------------------------------------------------------- formulas

const dot = (a, b) => a[0] * b[0] + a[1] * b[1];
const minus = (a, b) => [a[0] - b[0], a[1] - b[1]];
const times = (k, a) => [k * a[0], k * a[1]];
const plus = (a, b) => [a[0] + b[0], a[1] + b[1]];
const norm = a => Math.hypot(a[0], a[1]);
const sigmoid = z => 1 / (1 + Math.exp(-z));

// What becomes of the own cosine u and of another one, and the slopes of both
const transforms = {
  normface: () => ({
    own: u => u, ownSlope: () => 1,
    other: u => u, otherSlope: () => 1}),
  cosface: ({margin}) => ({
    own: u => u - margin, ownSlope: () => 1,
    other: u => u, otherSlope: () => 1}),
  arcface: ({margin}) => {
    const near = u => u > -Math.cos(margin); // the angle plus the margin is below pi
    const sin = u => Math.sqrt(Math.max(1 - u * u, 2 ** -52));
    return {
      own: u => near(u)
        ? u * Math.cos(margin) - sin(u) * Math.sin(margin)
        : u - margin * Math.sin(margin),
      ownSlope: u => near(u) ? Math.cos(margin) + u / sin(u) * Math.sin(margin) : 1,
      other: u => u, otherSlope: () => 1};
  },
  circle: ({margin}) => ({ // weights by the distance to the goal, which gradients leave alone
    own: u => Math.max(1 + margin - u, 0) * (u - 1 + margin),
    ownSlope: u => Math.max(1 + margin - u, 0),
    other: u => Math.max(u + margin, 0) * (u - margin),
    otherSlope: u => Math.max(u + margin, 0)}),
};

// Cross-entropy of scaled, transformed cosines. anchors: class directions, the own one first
function cosineLoss(x, anchors, {transform, scale, margin}) {
  const t = transforms[transform]({margin});
  const length = Math.max(norm(x), 1e-12);
  const unit = times(1 / length, x);
  const units = anchors.map(w => times(1 / norm(w), w));
  const cos = units.map(w => dot(w, unit));
  const logits = cos.map((u, j) => scale * (j ? t.other(u) : t.own(u)));
  const top = Math.max(...logits);
  const exps = logits.map(z => Math.exp(z - top));
  const sum = exps.reduce((a, b) => a + b);
  let grad = [0, 0];
  units.forEach((w, j) => {
    const p = exps[j] / sum;
    const slope = scale * (j ? p * t.otherSlope(cos[j]) : (p - 1) * t.ownSlope(cos[j]));
    grad = plus(grad, times(slope / length, minus(w, times(cos[j], unit))));
  });
  return {value: top + Math.log(sum) - logits[0], grad};
}

// Squared distance to the own center, times a sigmoid of itself
function sigma2rLoss(x, anchors, {slope, tau, unit}) {
  const away = minus(x, anchors[0]);
  const d = dot(away, away);
  const f = sigmoid(slope * (d / unit - tau));
  return {value: f * d, grad: times(2 * (f + d * f * (1 - f) * slope / unit), away)};
}

// Distances to the other samples against their targets. anchors: a sample of the own class, then others
function ldmatLoss(x, anchors, {delta, slack}) {
  let value = 0, grad = [0, 0];
  anchors.forEach((a, j) => {
    const away = minus(x, a);
    const d = norm(away);
    const miss = d - (j ? delta : slack * delta);
    value += miss * miss / anchors.length;
    if (d > 0) grad = plus(grad, times(2 * miss / anchors.length / d, away));
  });
  return {value, grad};
}

const third = k => [Math.sin(2 * Math.PI * k / 3), Math.cos(2 * Math.PI * k / 3)];
const slider = (label, min, max, step, start) => ({label, min, max, step, start});
const scale = slider('scale s', 1, 64, 1, 10);
const cosine = (name, what, margin) => ({
  name, what, loss: (x, a, set) => cosineLoss(x, a, {...set, transform: name.toLowerCase()}),
  anchors: [third(0), third(1), third(2)], sliders: margin ? {scale, margin} : {scale},
  across: 'angle to the own class, degrees', most: 180, anchorNames: ['own', 'other', 'other'],
  place: (x, a) => Math.acos(Math.max(-1, Math.min(1, dot(x, a[0]) / norm(x) / norm(a[0])))) * 180 / Math.PI,
  at: (t, a, x) => { // a turn from the own class to the side of the sample
    const turn = t * Math.PI / 180, length = norm(x);
    return [Math.sign(x[0] || 1) * length * Math.sin(turn), length * Math.cos(turn)];
  }});
// From the first anchor towards the sample
const away = (t, a, x) => plus(a[0], times(t / (norm(minus(x, a[0])) || 1), minus(x, a[0])));
const games = {
  normface: cosine('NormFace', 'Only the angle counts. With a larger scale, the push ends as soon as the own class is the nearest.'),
  cosface: cosine('CosFace', 'The margin is taken from the own cosine, so the push goes on beyond the boundary.',
    slider('margin m', 0, 1, 0.01, 0.35)),
  arcface: cosine('ArcFace', 'The margin is added to the own angle. Where the sum passes 180°, another formula takes over, and the curve jumps.',
    slider('margin m, radians', 0, 1.57, 0.01, 0.5)),
  circle: cosine('Circle', 'The farther a cosine is from its goal, the harder it is pushed.',
    slider('margin m', 0.01, 0.99, 0.01, 0.25)),
  sigma2r: {
    name: 'σ²R', what: 'The squared distance to the center, times a sigmoid of it. With slope 0 this is center loss.',
    loss: sigma2rLoss, anchors: [[0, 0]], anchorNames: ['center'],
    sliders: {slope: slider('slope', 0, 10, 0.1, 1), tau: slider('turning point τ', 0, 3, 0.05, 1),
      unit: slider('mean squared distance ν', 0.1, 3, 0.05, 1)},
    across: 'distance to the center', most: 2, place: (x, a) => norm(minus(x, a[0])), at: away},
  ldmat: {
    name: 'LDMAT', what: 'Each distance has a target: δ to samples of other classes, slack times δ to the sample of the own class.',
    loss: ldmatLoss, anchors: [[0, 0.7], [0.9, -0.6], [-0.9, -0.6]], anchorNames: ['own', 'other', 'other'],
    sliders: {delta: slider('distance δ between classes', 0.2, 2.5, 0.05, 1.4), slack: slider('slack', 0, 0.95, 0.05, 0)},
    across: 'distance to the sample of the own class', most: 2,
    place: (x, a) => norm(minus(x, a[0])), at: away},
};

if (typeof module !== 'undefined') module.exports = {cosineLoss, sigma2rLoss, ldmatLoss, games};

// ---------------------------------------------------------------- the page

function play(root) {
  const find = name => root.querySelector(`[data-play=${name}]`);
  const plane = find('plane'), curve = find('curve'), panel = find('sliders'), says = find('says');
  const reach = 1.6; // the plane shows -reach to reach
  const colors = ['#0072b2', '#d55e00', '#009e73'];
  let game, settings, anchors, point;

  const ink = () => getComputedStyle(document.body).color;
  const faint = alpha => ink().replace('rgb(', 'rgba(').replace(')', `, ${alpha})`);
  const loss = x => game.loss(x, anchors, settings);

  function fit(canvas, height) { // as sharp as the screen
    const ratio = window.devicePixelRatio || 1, width = canvas.clientWidth;
    const high = Math.round(height(width));
    canvas.style.height = `${high}px`;
    canvas.width = width * ratio;
    canvas.height = high * ratio;
    const c = canvas.getContext('2d');
    c.setTransform(ratio, 0, 0, ratio, 0, 0);
    c.font = '13px system-ui, sans-serif';
    return [c, width, high];
  }

  function arrow(c, from, to) {
    const turn = Math.atan2(to[1] - from[1], to[0] - from[0]);
    c.beginPath();
    c.moveTo(...from);
    c.lineTo(...to);
    for (const side of [2.6, -2.6]) {
      c.moveTo(...to);
      c.lineTo(to[0] + 4 * Math.cos(turn + side), to[1] + 4 * Math.sin(turn + side));
    }
    c.stroke();
  }

  function disc(c, at, radius, color) {
    c.beginPath();
    c.arc(...at, radius, 0, 7);
    c.fillStyle = color;
    c.fill();
    c.strokeStyle = ink();
    c.lineWidth = 1.5;
    c.stroke();
  }

  function drawSurface(c, size, where) { // the more loss, the deeper; a small picture, made larger
    const cells = 120, step = size / cells, small = document.createElement('canvas');
    small.width = small.height = cells;
    const values = [];
    for (let j = 0; j < cells; j++) for (let i = 0; i < cells; i++)
      values.push(loss(where([(i + 0.5) * step, (j + 0.5) * step])).value);
    const least = Math.min(...values), most = Math.max(...values);
    const picture = new ImageData(cells, cells);
    values.forEach((v, k) => {
      const alpha = 191 * (v - least) / (most - least || 1);
      picture.data.set([0, 114, 178, alpha], 4 * k);
    });
    small.getContext('2d').putImageData(picture, 0, 0);
    c.drawImage(small, 0, 0, size, size);
  }

  function drawPlane() {
    const [c, size] = fit(plane, w => w);
    const pixel = x => [(x[0] / reach + 1) * size / 2, (1 - x[1] / reach) * size / 2];
    const where = p => [(2 * p[0] / size - 1) * reach, (1 - 2 * p[1] / size) * reach];
    drawSurface(c, size, where);
    const grid = 15, gap = size / grid, pushes = [];
    for (let i = 0; i < grid; i++) for (let j = 0; j < grid; j++) {
      const at = [(i + 0.5) * gap, (j + 0.5) * gap];
      if (norm(where(at)) > 0.15) pushes.push([at, loss(where(at)).grad]);
    }
    const strongest = Math.max(...pushes.map(([, g]) => norm(g))) || 1;
    c.strokeStyle = faint(0.8);
    c.lineWidth = 1.2;
    for (const [at, g] of pushes) { // lengths by the root, so that weak pushes are seen
      const n = norm(g), long = gap * 0.9 * Math.sqrt(n / strongest);
      if (long > 2) arrow(c, at, [at[0] - g[0] / n * long, at[1] + g[1] / n * long]);
    }
    anchors.forEach((a, j) => {
      disc(c, pixel(a), 8, colors[Math.min(j, 1)]);
      c.fillStyle = ink();
      c.fillText(game.anchorNames[j], pixel(a)[0] + 12, pixel(a)[1] + 4);
    });
    disc(c, pixel(point), 7, '#f0e442');
    c.strokeStyle = faint(0.3);
    c.strokeRect(0.5, 0.5, size - 1, size - 1);
    const {value, grad} = loss(point);
    find('value').textContent = `loss ${value.toFixed(3)}, gradient ${norm(grad).toFixed(3)}`;
  }

  function drawCurve() {
    const [c, width, height] = fit(curve, w => Math.min(w * 0.62, 300));
    const left = 46, right = 10, top = 26, low = height - 40, n = 160;
    const ts = Array.from({length: n + 1}, (_, i) => (i + 1e-3) / (n + 2e-3) * game.most);
    const values = ts.map(t => loss(game.at(t, anchors, point)).value);
    const most = Math.max(...values, 1e-9);
    const px = t => left + t / game.most * (width - left - right), py = v => low - v / most * (low - top);
    c.strokeStyle = faint(0.3);
    c.strokeRect(left, top, width - left - right, low - top);
    c.strokeStyle = '#2a93d5'; // seen on white and on dark ground
    c.lineWidth = 2;
    c.beginPath();
    values.forEach((v, i) => c.lineTo(px(ts[i]), py(v)));
    c.stroke();
    c.fillStyle = ink();
    c.textAlign = 'center';
    c.fillText(game.across, (left + width - right) / 2, height - 6, width - left);
    for (const k of [0, 0.5, 1]) c.fillText(String(+(k * game.most).toFixed(1)), px(k * game.most * 0.98), low + 16);
    c.textAlign = 'right';
    for (const k of [0, 1]) c.fillText((k * most).toPrecision(2), left - 6, py(k * most) + 5);
    c.textAlign = 'left';
    c.fillText('loss', left, 16);
    const t = game.place(point, anchors);
    if (t <= game.most) disc(c, [px(t), py(Math.min(loss(game.at(t, anchors, point)).value, most))], 5, '#f0e442');
  }

  function draw() {
    drawPlane();
    drawCurve();
  }

  function choose(name) {
    game = games[name];
    settings = {};
    anchors = game.anchors.map(a => [...a]);
    point = [0.8, 0.3];
    panel.replaceChildren();
    says.textContent = game.what;
    for (const [key, s] of Object.entries(game.sliders)) {
      settings[key] = s.start;
      const label = document.createElement('label'), input = document.createElement('input');
      const shown = document.createElement('output');
      Object.assign(input, {type: 'range', min: s.min, max: s.max, step: s.step, value: s.start, name: key});
      shown.textContent = s.start;
      input.addEventListener('input', () => {
        settings[key] = +input.value;
        shown.textContent = input.value;
        draw();
      });
      label.append(s.label, input, shown);
      panel.append(label);
    }
    draw();
  }

  function move(to) {
    point = to.map(v => Math.max(-reach, Math.min(reach, v)));
    draw();
  }
  plane.addEventListener('pointerdown', e => plane.setPointerCapture(e.pointerId));
  for (const kind of ['pointerdown', 'pointermove']) plane.addEventListener(kind, e => {
    if (!e.buttons) return;
    const size = plane.clientWidth;
    move([(2 * e.offsetX / size - 1) * reach, (1 - 2 * e.offsetY / size) * reach]);
  });
  const ways = {ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1]};
  plane.addEventListener('keydown', e => {
    if (!ways[e.key]) return;
    e.preventDefault();
    move(plus(point, times(0.05, ways[e.key])));
  });

  const select = find('loss');
  for (const [key, g] of Object.entries(games)) select.add(new Option(g.name, key));
  select.addEventListener('change', () => choose(select.value));
  new ResizeObserver(draw).observe(root);
  new MutationObserver(draw).observe(document.body, {attributes: true, attributeFilter: ['class']});
  select.value = 'arcface';
  choose('arcface');
}

if (typeof document !== 'undefined') document.querySelectorAll('.play').forEach(play);
