// How texts of tokens and numbers are shown.

const NAMED = { "\n": "↵", "\t": "⇥", "\r": "␍" };
// Controls, formatting (zero width, direction), private and unassigned characters, and all spaces but U+0020
const UNSEEN = /[\p{Cc}\p{Cf}\p{Co}\p{Cn}\p{Cs}\p{Zl}\p{Zp}]|(?! )\p{Zs}/gu;

/** A token's text with a visible sign for each character that has none, and a circle below a lone combining mark. */
function visible(text) {
  const signs = text.replace(
    UNSEEN,
    (c) => NAMED[c] ?? `⟨U+${c.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}⟩`,
  );
  return /^\p{M}/u.test(signs) ? `◌${signs}` : signs;
}

/** The text of a token that is none by itself, such as part of a character, as the rest of the API shows it. */
export function named(name) {
  return name.replace(/^token_id:(?=\d+$)/, "#");
}

/** The text itself: the server writes spaces, line ends and tabs as ␣, \n and \t. */
function plain(text) {
  return text.replaceAll("␣", " ").replaceAll("\\n", "\n").replaceAll("\\t", "\t");
}

/** A token's text by itself, where a space could be overlooked. */
export function alone(text) {
  return text ? visible(plain(text)).replaceAll(" ", "␣") : "(no text)";
}

/** A token's text among others, where its background shows its spaces. */
export function running(text) {
  return text ? visible(plain(text)) : "∅";
}

/** Whether a token ends a line of the text. */
export function endsLine(text) {
  return /(\n|\\n)$/.test(text);
}

/** A probability as per cent, with two digits that count. */
export function percent(p) {
  if (!Number.isFinite(p)) return "–";
  const value = 100 * p;
  if (value < 0.01) return "< 0.01 %";
  if (value >= 99.95) return "100 %";
  return `${value.toFixed(value >= 10 ? 0 : value >= 1 ? 1 : 2)} %`;
}

function digitsOf(x) {
  const size = Math.abs(x);
  if (size >= 100) return 0;
  if (size >= 10) return 1;
  return size >= 0.01 || size === 0 ? 2 : 4;
}

/** A number with a true minus sign and, by default, three digits that count. */
export function number(x, digits = digitsOf(x)) {
  return Number.isFinite(x) ? x.toFixed(digits).replace("-", "−") : "–";
}

/** A number with its sign. */
export function signed(x, digits = digitsOf(x)) {
  return x > 0 ? `+${number(x, digits)}` : number(x, digits);
}

/** A whole number with its thousands apart. */
export function whole(n) {
  return n.toLocaleString("en-US");
}

/** How many of something there are, with its noun. */
export function count(n, noun) {
  return `${whole(n)} ${noun}${n === 1 ? "" : "s"}`;
}
