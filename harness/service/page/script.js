/**
 * Reads a script as the server does (harness/traffic/script.py, rule by rule; a test compares the two), but line by
 * line and without stopping at the first mistake: the editor shows all of them while somebody writes.
 */

export const MAX_SPEAKERS = 4;
const LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ";

const TICKS_PER_S = 90; // of speech: 180 words, 270 syllables or 600 letters a minute
const [WORD, SYLLABLE, LETTER] = [30, 20, 9];
const LONGEST_WORD = 12; // caseless letters; a longer run is several words

const HEAD = 160; // a marker must be within so many characters
const LONGEST_LABEL = 30;
const SPACES = String.raw`\t-\r\x1c-\x20\x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000`;
const S = `[${SPACES}]`;
const TIME = String.raw`[0-9]{1,2}(?::[0-9]{2}){1,2}(?:[.,][0-9]{1,6})?`;
const SPAN = `${TIME}(?:${S}{0,4}(?:-->|-|–)${S}{0,4}${TIME})?`;
const STAMP = String.raw`(?:\[${S}?${SPAN}${S}?\]|\(${S}?${SPAN}${S}?\)|${SPAN})`;
const BEFORE =
  String.raw`^${S}{0,40}(?:(?:[\-*+•>#]{1,6}|[0-9]{1,4}[.)])${S}{1,8}){0,3}(?:${STAMP}${S}{0,4}[\-–|]?${S}{0,4})?` +
  String.raw`(?<mark>\*{0,3}|_{0,3})(?<open>[\[(<]?)${S}?`;
const MARKER = new RegExp(
  String.raw`${BEFORE}speaker(?:(?:[_\-]|${S}{0,8}#?)(?<number>[\-+]?\p{Nd}+)` +
    String.raw`|(?:${S}{1,8}|_|-)(?<letter>[a-z])(?![\p{L}\p{N}]))${S}?` +
    String.raw`(?<close>[\])>]?)(?<after>\*+|_+|)(?:${S}{0,8}${STAMP})?${S}{0,8}(?<colon>[:：]?)`,
  "iu",
);
const HUGE = new RegExp(`^${S}{0,40}speaker${S}{0,8}(?<number>[0-9]{10})`, "iu");
const BRACKETED = new RegExp(String.raw`^${S}{0,40}\[${S}?(?<name>speaker[_ \-]?[\p{L}\p{N}_]*)${S}?\]`, "iu");
const PLAIN = String.raw`[^${SPACES}:：\[\]()<>*]`;
const LABEL = new RegExp(
  String.raw`${BEFORE}(?<label>[\p{L}\p{Nl}\p{No}]${PLAIN}*(?: ${PLAIN}+){0,2})${S}?[\])>]?(?:\*+|_+|)` +
    String.raw`(?:${S}{0,8}${STAMP})?${S}?[:：]`,
  "u",
);
const PAIRS = { "": "", "[": "]", "(": ")", "<": ">" };
const EDGES = new RegExp(`^${S}+|${S}+$`, "gu");
const WORDS = new RegExp(`[^${SPACES}]+`, "gu");
const TEXT = /[^\p{C}\p{Z}]/u;
const WIDE = /[\p{scx=Han}\p{scx=Hira}\p{scx=Kana}\p{scx=Hang}\p{scx=Bopo}]/u;

const strip = (text) => text.replace(EDGES, "");

/**
 * What a script says. `lines`: for each line its text, speaker (1 to 4, or null) and length of marker; `speakers`: who
 * speaks, in order; `errors` and `remarks`: {line, message}, with `isUnfinished` where more text is missing;
 * `seconds`: estimated length of the speech; `labels`: names that look like speakers, where no line has a marker.
 */
export function readScript(text) {
  const rows = text.replace(/^\ufeff/, "").split(/\r\n|\r|\n/).map(readLine);
  const isMarked = rows.some((row) => row.written !== null);
  const errors = isMarked ? markedTurns(rows) : oneTurn(rows);
  for (const row of rows) if (row.error) errors.push({ line: row.line, message: row.error });
  errors.sort((a, b) => a.line - b.line);
  const alike = lookAlikes(rows);
  return {
    lines: rows.map(({ text, speaker, end }) => ({ text, speaker, end })),
    speakers: [...new Set(rows.map((row) => row.speaker).filter((speaker) => speaker !== null))].sort(),
    errors,
    remarks: isMarked ? alike.map(remark) : [],
    labels: isMarked ? [] : [...new Set(alike.filter(({ row }) => LABEL.test(head(row.text))).map(({ label }) => label))],
    seconds: rows.reduce((sum, row) => sum + (TEXT.test(row.spoken) ? ticks(row.spoken) : 0), 0) / TICKS_PER_S,
  };
}

/** The script with its labels ("Anna:") as markers of speakers 1, 2, … in the order in which they speak first. */
export function withNumbers(text, labels) {
  const numbered = (line) => {
    const found = LABEL.exec(head(line));
    const number = found ? labels.indexOf(found.groups.label) + 1 : 0;
    return number ? `Speaker ${number}: ${strip(line.slice(found[0].length))}` : line;
  };
  return text.split("\n").map(numbered).join("\n");
}

function readLine(text, index) {
  const row = { line: index + 1, text, spoken: text, written: null, speaker: null, end: 0, error: null };
  const start = head(text);
  const huge = HUGE.exec(start);
  if (huge) return { ...row, written: huge.groups.number, spoken: "", end: huge[0].length };
  const found = MARKER.exec(start);
  const spoken = found && textAfter(found, text);
  if (spoken != null) {
    const { number, letter } = found.groups;
    return { ...row, written: number ?? letter.toUpperCase(), spoken, end: found[0].length };
  }
  const wrong = BRACKETED.exec(start);
  const error = wrong && `There is no speaker [${wrong.groups.name}]. Write “Speaker 1:” to “Speaker ${MAX_SPEAKERS}:”.`;
  return { ...row, error };
}

const head = (text) => [...text.slice(0, 2 * HEAD)].slice(0, HEAD).join("");

/** The spoken text after a marker; null if it is not a marker after all. */
function textAfter(found, line) {
  const { mark, after, open, close, colon } = found.groups;
  let text = strip(line.slice(found[0].length));
  if (close !== PAIRS[open]) return null;
  if (after !== mark) {
    // closing bold or italics come after the colon, at the end of the line, or not at all
    if (after || !mark) return null;
    if (text.startsWith(mark)) text = strip(text.slice(mark.length));
    else if (text.endsWith(mark)) text = strip(text.slice(0, -mark.length));
    else return null;
  }
  return colon || open || !text ? text : null;
}

/** Gives every line of a script with markers its speaker; returns the errors. */
function markedTurns(rows) {
  const errors = [];
  const first = rows.some((row) => row.written !== null && numberOf(row.written) === 0) ? 0 : 1;
  let turn = null;
  for (const row of rows) {
    if (row.written !== null) {
      endTurn(turn, errors);
      turn = { row, speaker: checkedSpeaker(row, first, errors), hasText: false };
    } else if (!turn && !row.error && TEXT.test(row.text) && !errors.length) {
      const message = "This is before the first speaker. Begin the line with “Speaker 1:”, or delete it.";
      errors.push({ line: row.line, message });
    }
    if (!turn) continue;
    row.speaker = turn.speaker;
    turn.hasText ||= TEXT.test(row.spoken);
  }
  endTurn(turn, errors);
  return errors;
}

function endTurn(turn, errors) {
  if (!turn || turn.hasText || turn.speaker === null) return;
  const message = `Speaker ${turn.speaker} says nothing. Write some words, or delete the line.`;
  errors.push({ line: turn.row.line, message, isUnfinished: true });
}

/** Text without a marker is spoken by speaker 1. */
function oneTurn(rows) {
  if (!rows.some((row) => TEXT.test(row.text)) && !rows.some((row) => row.error)) {
    return [{ line: 1, message: "Write at least one line, such as “Speaker 1: Hello.”", isUnfinished: true }];
  }
  for (const row of rows) row.speaker = 1;
  return [];
}

/** The speaker, from 1; null, with an error, outside the range. Numbers count from `first`, letters from A. */
function checkedSpeaker(row, first, errors) {
  const isLetter = LETTERS.includes(row.written);
  const speaker = numberOf(row.written) + (isLetter ? 0 : 1 - first);
  if (speaker >= 1 && speaker <= MAX_SPEAKERS) return speaker;
  const written = isLetter ? speaker : [...row.written].slice(0, 12).join("");
  const last = first + MAX_SPEAKERS - 1;
  const message = `There is no speaker ${written}. Write “Speaker ${first}:” to “Speaker ${last}:”.`;
  errors.push({ line: row.line, message });
  return null;
}

/** The number of a speaker, in digits of any script; -1 where there are too many of them. */
function numberOf(written) {
  if (LETTERS.includes(written)) return LETTERS.indexOf(written) + 1;
  if ([...written].length >= 10) return -1;
  return Number([...written].map((digit) => (/\p{Nd}/u.test(digit) ? digitValue(digit) : digit)).join(""));
}

/** Unicode keeps the ten digits of a script together, in order. */
function digitValue(digit) {
  const code = digit.codePointAt(0);
  let before = 0;
  while (/\p{Nd}/u.test(String.fromCodePoint(code - before - 1))) before += 1;
  return before % 10;
}

/** Unmarked lines that start as if they named a speaker. */
function lookAlikes(rows) {
  const labelled = rows.filter((row) => row.written === null && !row.error).map((row) => ({ row, label: labelOf(row.text) }));
  const counts = new Map();
  for (const { label } of labelled) counts.set(label, (counts.get(label) ?? 0) + 1);
  return labelled.filter(({ label }) => label && (counts.get(label) > 1 || namesSomebody(label)));
}

const remark = ({ row, label }) => ({
  line: row.line,
  message: `“${label}” will be spoken. To name a speaker, write “Speaker 1:”.`,
});

/** The text before the colon of a line, or an incomplete marker; "" for neither. */
function labelOf(text) {
  const label = LABEL.exec(head(text))?.groups.label;
  if (label && [...label].length <= LONGEST_LABEL) return label;
  const found = MARKER.exec(head(text));
  return found ? strip(found[0]) : "";
}

function namesSomebody(label) {
  const startsUpper = (word) => /^\p{Lu}/u.test(word);
  return label.toLowerCase().includes("speaker") || /\p{Nd}$/u.test(label) || label.split(" ").every(startsUpper);
}

/** Estimated duration of a text in ticks. Where words have no spaces between them, characters are counted. */
function ticks(text) {
  let sum = 0;
  for (const [word] of text.matchAll(WORDS)) sum += /^[\x00-\x7f]*$/.test(word) ? WORD : ticksOfWord(word);
  return sum;
}

function ticksOfWord(word) {
  const kinds = [...word].map(kindOf).join("");
  const isLong = kinds.split(/[^cm]/).some((run) => run.split("c").length - 1 > LONGEST_WORD);
  if (!kinds.includes("w") && !isLong) return WORD;
  const length = { w: SYLLABLE, c: LETTER };
  return (kinds.match(/w|c|a+/g) ?? []).reduce((sum, part) => sum + (length[part[0]] ?? WORD), 0);
}

/** w: a wide letter, such as an ideograph; c: a caseless one; a: another letter or digit; m: a mark; p: other. */
function kindOf(character) {
  if (/[\p{Lo}\p{Lm}]/u.test(character)) return WIDE.test(character) ? "w" : "c";
  if (/[\p{L}\p{N}]/u.test(character)) return "a";
  return /\p{M}/u.test(character) ? "m" : "p";
}
