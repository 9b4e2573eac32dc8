//! How byte-pair vocabularies cut text into words before merging.
//!
//! Each rule is the regular expressions of the original `tokenizer.json`, applied one after the other: what an
//! expression matches becomes pieces, and so does what lies between the matches. The only look-ahead that they use,
//! `\s+(?!\S)` (a run of white space leaves its last character to the word behind it), is applied to the match
//! afterwards, so that an engine without look-ahead, linear in the text, does the rest.

use regex::Regex;

use crate::{Error, Result};

use super::VocabularyData;

/// A way to cut words.
#[derive(Debug)]
pub(crate) struct Rule {
    /// The values of `tokenizer.ggml.pre` that mean this rule.
    names: &'static [&'static str],
    steps: &'static [&'static str],
    /// A word that is a token is taken without merging (`ignore_merges`).
    pub whole_words: bool,
    /// Whether encoding begins with the beginning-of-sequence token if the file says nothing.
    pub add_bos: bool,
    /// Whether tokens are written in the byte alphabet, or in characters with marks for spaces.
    pub byte_level: bool,
}

const BASE: Rule = Rule { names: &[], steps: &[], whole_words: false, add_bos: false, byte_level: true };

/// In the place of an expression: digits in groups of three, counted from the right.
const DIGITS_FROM_RIGHT: &str = "digits from the right";

const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN35: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const UFAKZEKA: &str = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const GPT4O: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const KIMI: &str = r"[\p{Han}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const DEEPSEEK3: &str = r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"##;
const DEEPSEEK_LETTERS: &str = "\
    \\s?[A-Za-z\u{b5}\u{c0}-\u{d6}\u{d8}-\u{f6}\u{f8}-\u{1ba}\u{1bc}-\u{1bf}\u{1c4}-\u{293}\u{295}-\
    \u{2af}\u{370}-\u{373}\u{376}\u{377}\u{37b}-\u{37d}\u{37f}\u{386}\u{388}-\u{38a}\u{38c}\u{38e}-\
    \u{3a1}\u{3a3}-\u{3f5}\u{3f7}-\u{481}\u{48a}-\u{52f}\u{531}-\u{556}\u{10a0}-\u{10c5}\u{13a0}-\
    \u{13f5}\u{13f8}-\u{13fd}\u{1c90}-\u{1cba}\u{1cbd}-\u{1cbf}\u{1d00}-\u{1d2b}\u{1d6b}-\u{1d77}\
    \u{1d79}-\u{1d9a}\u{1e00}-\u{1f15}\u{1f18}-\u{1f1d}\u{1f20}-\u{1f45}\u{1f48}-\u{1f4d}\u{1f50}-\
    \u{1f57}\u{1f59}\u{1f5b}\u{1f5d}\u{1f5f}-\u{1f7d}\u{1f80}-\u{1fb4}\u{1fb6}-\u{1fbc}\u{1fbe}\
    \u{1fc2}-\u{1fc4}\u{1fc6}-\u{1fcc}\u{1fd0}-\u{1fd3}\u{1fd6}-\u{1fdb}\u{1fe0}-\u{1fec}\u{1ff2}-\
    \u{1ff4}\u{1ff6}-\u{1ffc}\u{2102}\u{2107}\u{210a}-\u{2113}\u{2115}\u{2119}-\u{211d}\u{2124}\
    \u{2126}\u{2128}\u{212a}-\u{212d}\u{212f}-\u{2134}\u{2139}\u{213c}-\u{213f}\u{2145}-\u{2149}\
    \u{214e}\u{2183}\u{2184}\u{2c00}-\u{2c7b}\u{2c7e}-\u{2ce4}\u{2ceb}-\u{2cee}\u{2cf2}\u{2cf3}\
    \u{a640}-\u{a66d}\u{a680}-\u{a69b}\u{a722}-\u{a76f}\u{a771}-\u{a787}\u{a78b}-\u{a78e}\u{ab70}-\
    \u{abbf}\u{fb00}-\u{fb06}\u{fb13}-\u{fb17}\u{ff21}-\u{ff3a}\u{ff41}-\u{ff5a}\u{10400}-\u{1044f}\
    \u{104b0}-\u{104d3}\u{104d8}-\u{104fb}\u{10c80}-\u{10cb2}\u{10cc0}-\u{10cf2}\u{118a0}-\u{118df}\
    \u{1e900}-\u{1e943}]+";
const DEEPSEEK_PUNCTUATION: &str =
    "\\s?[!-/:-~\u{ff01}-\u{ff0f}\u{ff1a}-\u{ff5e}\u{2018}-\u{201f}\u{3000}-\u{3002}]+";
const DEEPSEEK_CJK: &str = "[\u{4e00}-\u{9fa5}\u{800}-\u{4e00}\u{ac00}-\u{d7ff}]+";
const CJK_AND_KANA: &str = "[\u{4e00}-\u{9fa5}\u{3040}-\u{309f}\u{30a0}-\u{30ff}]+";
const BLOOM: &str = " ?[^(\\s|.,!?\u{2026}\u{3002}\u{ff0c}\u{3001}\u{964}\u{6d4}\u{60c})]+";
const AFMOE_SCRIPTS: &str = "\
    [\u{4e00}-\u{9fff}\u{3400}-\u{4dbf}\u{8c48}-\u{faff}\u{3040}-\u{309f}\u{30a0}-\u{30ff}\u{ff65}-\
    \u{ff9f}\u{2f00}-\u{2fdf}\u{e40}-\u{e7f}\u{e80}-\u{eff}\u{1780}-\u{17ff}\u{1000}-\u{109f}\
    \u{aa60}-\u{aa7f}\u{a9e0}-\u{a9ff}\u{ac00}-\u{d7af}\u{1100}-\u{11ff}]+";
const SEED_CODER: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1}| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+";
const BAILING: &str =
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+";
const MINICPM5: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}+| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const LINES: &str = r"[^\n]+|[\n]+";

/// The known rules. The first is taken where a file names none.
const RULES: &[Rule] = &[
    Rule {
        names: &["", "default"],
        steps: &[r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"],
        ..BASE
    },
    Rule {
        names: &[
            "gpt-2",
            "phi-2",
            "jina-es",
            "jina-de",
            "jina-v1-en",
            "jina-v2-code",
            "jina-v2-de",
            "jina-v2-es",
            "roberta-bpe",
            "gigachat",
            "a.x-4.0",
            "mellum",
            "modern-bert",
            "mpt",
            "olmo",
            "jais",
            "trillion",
            "granite-docling",
            "exaone4",
        ],
        steps: &[GPT2],
        ..BASE
    },
    Rule {
        names: &[
            "starcoder",
            "refact",
            "command-r",
            "smollm",
            "codeshell",
            "exaone",
            "minerva-7b",
            "mellum2",
        ],
        steps: &[r"\p{N}", GPT2],
        ..BASE
    },
    Rule { names: &["falcon"], steps: &[r"[\p{P}\$\+<=>\^~\|`]+", GPT2, r"[0-9][0-9][0-9]"], ..BASE },
    Rule {
        names: &[
            "llama3",
            "llama-v3",
            "llama-bpe",
            "falcon3",
            "falcon-h1",
            "pixtral",
            "midm-2.0",
            "lfm2",
            "jina-v5-nano",
        ],
        steps: &[LLAMA3],
        whole_words: true,
        add_bos: true,
        ..BASE
    },
    Rule { names: &["dbrx", "smaug-bpe", "chatglm-bpe"], steps: &[LLAMA3], ..BASE },
    Rule { names: &["glm4", "glm5"], steps: &[LLAMA3], whole_words: true, ..BASE },
    Rule {
        names: &[
            "qwen2",
            "deepseek-r1-qwen",
            "kormo",
            "f2llmv2",
            "megrez",
            "stablelm2",
            "hunyuan",
            "solar-open",
            "grok-2",
        ],
        steps: &[QWEN2],
        ..BASE
    },
    Rule { names: &["qwen35"], steps: &[QWEN35], ..BASE },
    Rule { names: &["ufakzeka"], steps: &[UFAKZEKA], ..BASE },
    Rule { names: &["laguna"], steps: &[LINES, QWEN2], ..BASE },
    Rule { names: &["gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2"], steps: &[GPT4O], ..BASE },
    Rule { names: &["granite-embed-multi-97m"], steps: &[GPT4O], whole_words: true, ..BASE },
    Rule { names: &["kimi-k2"], steps: &[KIMI], ..BASE },
    Rule { names: &["tiny_aya", "cohere2moe"], steps: &[DIGITS_FROM_RIGHT, GPT4O], ..BASE },
    Rule { names: &["superbpe"], steps: &[r"\p{N}+", DIGITS_FROM_RIGHT], ..BASE },
    Rule { names: &["tekken"], steps: &[TEKKEN], whole_words: true, add_bos: true, ..BASE },
    Rule {
        names: &["deepseek-llm"],
        steps: &["[\r\n]", DEEPSEEK_LETTERS, DEEPSEEK_PUNCTUATION, r"\s+$", DEEPSEEK_CJK, r"\p{N}+"],
        ..BASE
    },
    Rule {
        names: &["deepseek-coder"],
        steps: &["[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", DEEPSEEK_CJK, r"\p{N}"],
        ..BASE
    },
    Rule {
        names: &["deepseek-v3", "hunyuan-dense", "joyai-llm", "hy_v4"],
        steps: &[r"\p{N}{1,3}", CJK_AND_KANA, DEEPSEEK3],
        ..BASE
    },
    Rule { names: &["afmoe"], steps: &[DIGITS_FROM_RIGHT, AFMOE_SCRIPTS, DEEPSEEK3], ..BASE },
    Rule { names: &["poro-chat", "bloom", "gpt3-finnish"], steps: &[BLOOM], ..BASE },
    Rule { names: &["viking"], steps: &[BLOOM, r"\p{N}"], ..BASE },
    Rule { names: &["seed-coder"], steps: &[SEED_CODER], ..BASE },
    Rule { names: &["bailingmoe", "bailingmoe2", "llada-moe"], steps: &[BAILING], ..BASE },
    Rule { names: &["minicpm5"], steps: &[r"\p{N}{1,3}", MINICPM5], whole_words: true, ..BASE },
    Rule {
        names: &["gemma4", "granite-embed-multi-311m"],
        steps: &[LINES],
        add_bos: true,
        byte_level: false,
        ..BASE
    },
    Rule { names: &["sarvam-moe"], steps: &[LINES], byte_level: false, ..BASE },
];

/// The rule that a vocabulary asks for.
pub(crate) fn rule(data: &VocabularyData) -> Result<&'static Rule> {
    // Files of the gemma4 family need not name their rule.
    let name = if data.model == "gemma4" { "gemma4" } else { data.pre.as_str() };
    let unknown = || Error::unsupported("tokenizer.ggml.pre", format!("the pre-tokenizer \"{name}\""));
    RULES.iter().find(|rule| rule.names.contains(&name)).ok_or_else(unknown)
}

/// The name of the rule with exactly these expressions; of several, one that takes whole words or not, as wanted.
pub(crate) fn name_of(steps: &[String], whole_words: bool) -> Option<&'static str> {
    let steps: Vec<&str> = steps.iter().map(|s| if s == BYTE_LEVEL { GPT2 } else { s }).collect();
    let rule = RULES.iter().find(|r| r.byte_level && r.whole_words == whole_words && r.steps == steps)?;
    // The names that other programs know, too.
    let known = ["llama-bpe", "smollm", "deepseek-v3"];
    known.into_iter().find(|name| rule.names.contains(name)).or(rule.names.first().copied())
}

/// In the place of an expression: the one of GPT-2, which `tokenizer.json` does not write out.
pub(crate) const BYTE_LEVEL: &str = "byte level";

/// One step of a rule, ready to run.
#[derive(Debug)]
enum Step {
    Expression {
        expression: Regex,
        /// A run of white space that is followed by something gives its last character away.
        leaves_last_space: bool,
        /// … unless it holds a line break, which another branch of the expression matches as it is.
        keeps_lines: bool,
    },
    DigitsFromRight,
}

/// Cuts text into words.
#[derive(Debug)]
pub(crate) struct PreTokenizer {
    steps: Vec<Step>,
}

const LOOK_AHEAD: &str = r"\s+(?!\S)|\s+";

impl Step {
    fn new(source: &str) -> Result<Step> {
        if source == DIGITS_FROM_RIGHT {
            return Ok(Step::DigitsFromRight);
        }
        let leaves_last_space = source.contains(LOOK_AHEAD);
        let expression = Regex::new(&source.replace(LOOK_AHEAD, r"\s+")).map_err(|e| {
            Error::unsupported("tokenizer.ggml.pre", format!("the expression {source:?} ({e})"))
        })?;
        Ok(Step::Expression { expression, leaves_last_space, keeps_lines: source.contains(r"\s*[\r\n]") })
    }

    /// The first match in `text` from byte `from` on: where it starts and ends.
    fn find(&self, text: &str, from: usize) -> Option<(usize, usize)> {
        match self {
            Step::Expression { expression, leaves_last_space, keeps_lines } => {
                let found = expression.find_at(text, from)?;
                let (start, mut end) = (found.start(), found.end());
                if *leaves_last_space && end < text.len() {
                    let run = found.as_str();
                    let last = run.chars().next_back().map_or(0, char::len_utf8);
                    let spaces = last < run.len()
                        && run
                            .chars()
                            .all(|c| c.is_whitespace() && !(*keeps_lines && matches!(c, '\r' | '\n')));
                    if spaces {
                        end -= last;
                    }
                }
                Some((start, end))
            }
            Step::DigitsFromRight => {
                let start = from + text[from..].find(|c: char| c.is_numeric())?;
                let digits = || text[start..].chars().take_while(|c| c.is_numeric());
                // The first group is what three does not divide; the others follow in later calls, uncounted.
                let follows = text[..start].chars().next_back().is_some_and(char::is_numeric);
                let rest = if follows { 0 } else { digits().count() % 3 };
                let group = if rest == 0 { 3 } else { rest };
                let end: usize = digits().take(group).map(char::len_utf8).sum();
                Some((start, start + end))
            }
        }
    }
}

impl PreTokenizer {
    pub fn new(rule: &Rule) -> Result<PreTokenizer> {
        Ok(PreTokenizer { steps: rule.steps.iter().map(|source| Step::new(source)).collect::<Result<_>>()? })
    }

    /// Gives the words of `text` in order; together they are `text`.
    pub fn split<'t>(&self, text: &'t str, emit: &mut impl FnMut(&'t str)) {
        split(&self.steps, text, emit);
    }
}

fn split<'t>(steps: &[Step], text: &'t str, emit: &mut dyn FnMut(&'t str)) {
    let Some((step, others)) = steps.split_first() else {
        return emit(text);
    };
    let mut at = 0;
    while at < text.len() {
        let Some((start, end)) = step.find(text, at) else {
            return split(others, &text[at..], emit);
        };
        if at < start {
            split(others, &text[at..start], emit);
        }
        // No expression matches nothing, but a rule that did would not end.
        let end = if end > start { end } else { text.len() };
        split(others, &text[start..end], emit);
        at = end;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn words(pre: &str, text: &str) -> Vec<String> {
        let data = VocabularyData { model: "gpt2".into(), pre: pre.into(), ..VocabularyData::default() };
        let mut words = Vec::new();
        PreTokenizer::new(rule(&data).unwrap()).unwrap().split(text, &mut |w| words.push(w.to_owned()));
        words
    }

    #[test]
    fn every_rule_compiles_and_has_its_own_names() {
        let mut seen = std::collections::BTreeSet::new();
        for rule in RULES {
            PreTokenizer::new(rule).unwrap();
            rule.names.iter().for_each(|name| assert!(seen.insert(name), "{name} twice"));
        }
    }

    #[test]
    fn the_last_space_goes_to_the_next_word() {
        assert_eq!(words("gpt-2", "a   b"), ["a", "  ", " b"]);
        assert_eq!(words("gpt-2", "a \n b  "), ["a", " \n", " b", "  "]);
        assert_eq!(words("gpt-2", "I'll 12 !\n"), ["I", "'ll", " 12", " !", "\n"]);
        assert_eq!(
            words("llama-bpe", "a  \n  b 12345!\n\n"),
            ["a", "  \n", " ", " b", " ", "123", "45", "!\n\n"]
        );
        assert_eq!(words("qwen2", "\u{3000}\u{3000}x 12"), ["\u{3000}", "\u{3000}x", " ", "1", "2"]);
        assert_eq!(words("tiny_aya", "1234567"), ["1", "234", "567"]);
        assert_eq!(words("gpt-4o", "HelloWorld's"), ["Hello", "World's"]);
    }

    #[test]
    fn unknown_rules_are_named() {
        let data =
            VocabularyData { model: "gpt2".into(), pre: "nonsense".into(), ..VocabularyData::default() };
        let error = rule(&data).unwrap_err().to_string();
        assert_eq!(error, "tokenizer.ggml.pre: the pre-tokenizer \"nonsense\" is not supported");
    }

    proptest! {
        #[test]
        fn words_together_are_the_text(text in "[a-zA-Z0-9 \t\r\n'!.,äß中文カ１२\u{301}]{0,60}", which in 0..RULES.len()) {
            let mut joined = String::new();
            PreTokenizer::new(&RULES[which]).unwrap().split(&text, &mut |word| {
                assert!(!word.is_empty());
                joined.push_str(word);
            });
            prop_assert_eq!(joined, text);
        }
    }
}
