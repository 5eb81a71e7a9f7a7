//! How the modules of an adapter are called elsewhere, and which of them are fused there.

use super::{Adapter, Lora, average::stack, layout, matrices::Pair};
use crate::{AdapterSpec, Error, Result, check_range, error::some_of};
use indexmap::IndexMap;
use regex::Regex;
use serde::Deserialize;
use std::{
    collections::{BTreeMap, HashSet},
    sync::LazyLock,
};

/// What a user says of modules' names: rules, of which the first that fits a module counts. Modules that none fits are treated as
/// [`Names`] says.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModuleMap {
    /// In TOML one `[[module]]` each.
    #[serde(default, rename = "module")]
    pub modules: Vec<MapEntry>,
}

/// One rule: `ours` is called `theirs`.
///
/// `{layer}`, or any other word in braces, stands for a number, the same on both sides. Grouped modules have `{expert}` in `theirs`
/// alone: they are one module an expert there.
///
/// A list on one side says that the other side's module is fused from these parts, in the order in which their rows lie in it; `rows`
/// are then the rows of each part in one group of rows: `[512, 128, 128]` for q, k and v of 4 heads of 128 channels that share a key/value
/// head, over and over. Without them the parts are taken to be of equal height, one behind the other.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MapEntry {
    /// Name in the adapter.
    pub ours: OneOrMore,
    /// Name elsewhere.
    pub theirs: OneOrMore,
    /// Rows of each part in a group.
    pub rows: Option<Vec<usize>>,
}

/// A name, or the names of the parts of a fused module.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(untagged)]
pub enum OneOrMore {
    /// A name.
    One(String),
    /// Names of parts.
    More(Vec<String>),
}

impl OneOrMore {
    fn patterns(&self) -> Result<Vec<Pattern>> {
        match self {
            Self::One(name) => Ok(vec![Pattern::new(name)?]),
            Self::More(names) => names.iter().map(|n| Pattern::new(n)).collect(),
        }
    }
}

/// The names of an adapter's modules in other programs.
///
/// Beside a [`ModuleMap`] there are built-in rules for the published modules (FORMAT.md sections 1 and 7), in two layouts. *Fused*:
/// modules are those of the published backbone, so that `qkv_proj` and `gate_and_up_proj` stay what they are, and the grouped experts
/// become `experts.{e}.gate_and_up_proj` (w3 and w1 as blocks, [up | gate], rank 2 r) and `experts.{e}.down_proj` (w2). *Split*: a
/// module for each projection, `q_proj`, `k_proj`, `v_proj`, `up_proj`, `gate_proj`, `experts.{e}.up_proj` (w3), `.gate_proj` (w1),
/// `.down_proj` (w2). Other modules keep their names. There and back loses nothing: every value returns bit for bit, and a
/// module whose name there another rule would read is an error.
#[derive(Clone, Debug)]
pub struct Names {
    rules: Vec<Rule>,
}

#[derive(Clone, Debug)]
struct Rule {
    ours: Vec<Pattern>,
    theirs: Vec<Pattern>,
    rows: Rows,
}

/// How the rows of parts lie in a fused module.
#[derive(Clone, Debug)]
enum Rows {
    /// One part behind the other.
    Behind,
    /// In groups.
    Groups(Vec<usize>),
    /// It must be said.
    Unknown,
}

const EXPERT: &str = "expert";
/// Most rows of a part in a group.
const MAX_ROWS: usize = 1 << 20;

impl Names {
    /// The built-in rules of the fused layout behind those of `map`.
    ///
    /// # Errors
    /// [`Error::Config`] for a rule that can't work.
    pub fn fused(map: &ModuleMap) -> Result<Self> {
        static BUILT_IN: LazyLock<Vec<Rule>> = LazyLock::new(|| {
            built_in(&[
                (
                    &["{*}.experts.w3", "{*}.experts.w1"],
                    &["{*}.experts.{expert}.gate_and_up_proj"],
                    Rows::Behind,
                ),
                (&["{*}.experts.w2"], &["{*}.experts.{expert}.down_proj"], Rows::Behind),
            ])
        });
        Self::new(map, BUILT_IN.clone())
    }

    /// The built-in rules of the split layout behind those of `map`. `qkv_rows`: the rows of q, k and v in one group of the fused
    /// module, which only the backbone's head counts tell: one key/value head with its queries for the published backbone, all heads
    /// for the bundled one.
    ///
    /// # Errors
    /// [`Error::Config`] for a rule that can't work.
    pub fn split(map: &ModuleMap, qkv_rows: Option<[usize; 3]>) -> Result<Self> {
        static BUILT_IN: LazyLock<Vec<Rule>> = LazyLock::new(|| {
            built_in(&[
                (&["{*}.experts.w3"], &["{*}.experts.{expert}.up_proj"], Rows::Behind),
                (&["{*}.experts.w1"], &["{*}.experts.{expert}.gate_proj"], Rows::Behind),
                (&["{*}.experts.w2"], &["{*}.experts.{expert}.down_proj"], Rows::Behind),
                (&["{*}.gate_and_up_proj"], &["{*}.up_proj", "{*}.gate_proj"], Rows::Behind),
                (&["{*}.qkv_proj"], &["{*}.q_proj", "{*}.k_proj", "{*}.v_proj"], Rows::Unknown),
            ])
        });
        let mut built_in = BUILT_IN.clone();
        if let Some(rows) = qkv_rows {
            for rule in built_in.iter_mut().filter(|rule| matches!(rule.rows, Rows::Unknown)) {
                rule.rows = Rows::Groups(rows.to_vec());
            }
        }
        Self::new(map, built_in)
    }

    fn new(map: &ModuleMap, built_in: Vec<Rule>) -> Result<Self> {
        let mut rules = Vec::new();
        for entry in &map.modules {
            let rows = entry.rows.clone().map_or(Rows::Behind, Rows::Groups);
            rules.push(Rule { ours: entry.ours.patterns()?, theirs: entry.theirs.patterns()?, rows });
        }
        rules.extend(built_in);
        rules.iter().try_for_each(Rule::check)?;
        Ok(Self { rules })
    }

    /// The names elsewhere of modules of these names, of those that have no experts.
    pub fn plain_targets<'a>(&'a self, ours: impl IntoIterator<Item = &'a str>) -> Vec<String> {
        ours.into_iter().flat_map(|name| self.called(name, &[])).map(|(name, _)| name).collect()
    }

    /// What a plain module of this name and of a weight of this shape is called elsewhere, or its parts are, with the shapes that follow.
    pub(super) fn called(&self, ours: &str, shape: &[usize]) -> Vec<(String, Option<Vec<usize>>)> {
        let Ok((rule, slots)) = self.find(ours, |rule| &rule.ours) else { return Vec::new() };
        let own = |part: usize| match (rule.ours.len(), rule.theirs.len(), shape) {
            (1, 1, _) => Some(shape.to_vec()),
            (1, parts, &[out, inner]) => {
                Some(vec![*layout::heights(rule.rows().ok()?, parts, out).ok()?.get(part)?, inner])
            }
            _ => None,
        };
        (0..).zip(&rule.theirs).filter_map(|(i, pattern)| Some((pattern.fill(&slots)?, own(i)))).collect()
    }

    /// Names that a flattened one (dots as underscores, as kohya writes them) may stand for, by the rules alone.
    pub(super) fn unflattened(&self, flat: &str) -> Vec<String> {
        let name = |pattern: &Pattern| pattern.fill(&slots_of(pattern.flat.as_ref()?, flat)?);
        self.rules.iter().flat_map(|rule| &rule.theirs).filter_map(name).collect()
    }

    /// An instance of an adapter, module by module, under their names.
    pub(super) fn to_theirs(&self, adapter: &Adapter, instance: usize) -> Result<IndexMap<String, Pair>> {
        adapter.check_instance(instance)?;
        let mut all = IndexMap::new();
        let mut done = HashSet::new();
        for name in adapter.modules.keys() {
            if done.contains(name) {
                continue;
            }
            let (rule, slots) = self.find(name, |rule| &rule.ours)?;
            let names = fill(&rule.ours, &slots, name)?;
            let loras = present(&names, |n| adapter.modules.get(n))?;
            let experts = loras[0].experts();
            if loras.iter().any(|l| l.experts() != experts) || experts.is_some() != rule.grouped() {
                let what = format!(
                    "{} can't go by one rule: {} experts, and the rule has {} {{expert}}; a module map may help",
                    some_of(&names),
                    experts.map_or("no".into(), |e| e.to_string()),
                    if rule.grouped() { "an" } else { "no" },
                );
                return Err(Error::Adapter(what));
            }
            for expert in 0..experts.unwrap_or(1) {
                let pairs: Option<Vec<Pair>> =
                    loras.iter().map(|l| Some(l.matrices(instance).get(expert)?.to_pair())).collect();
                let pairs =
                    pairs.ok_or_else(|| Error::Adapter(format!("`{name}` has no expert {expert}")))?;
                let mut slots = slots.clone();
                if experts.is_some() {
                    slots.insert(EXPERT.to_owned(), expert.to_string());
                }
                let theirs = fill(&rule.theirs, &slots, name)?;
                for (name, pair) in
                    theirs.into_iter().zip(rule.to_theirs(pairs).map_err(|e| within(name, &e))?)
                {
                    if all.contains_key(&name) {
                        return Err(Error::Adapter(format!("two modules would be called `{name}`")));
                    }
                    let (read_by, read) = self.find(&name, |rule| &rule.theirs)?;
                    if !std::ptr::eq(read_by, rule) || read != slots {
                        let read = read_by.ours[0].fill(&read).unwrap_or_default();
                        return Err(Error::Adapter(format!(
                            "{} would be called `{name}`, which would be read back as `{read}`; a module map may help",
                            some_of(&names)
                        )));
                    }
                    all.insert(name, pair);
                }
            }
            done.extend(names);
        }
        Ok(all)
    }

    /// The reverse of [`Names::to_theirs`], for an adapter of one instance. Parts of a fused module that are not there do nothing: the
    /// whole is the same operator. Their names come along.
    pub(super) fn to_ours(
        &self,
        theirs: &IndexMap<String, Pair>,
    ) -> Result<(IndexMap<String, Lora>, Vec<String>)> {
        let mut absent = Vec::new();
        let mut all = IndexMap::<String, BTreeMap<Option<usize>, Pair>>::new();
        let mut done = HashSet::new();
        for name in theirs.keys() {
            if done.contains(name) {
                continue;
            }
            let (rule, slots) = self.find(name, |rule| &rule.theirs)?;
            let names = fill(&rule.theirs, &slots, name)?;
            let pairs: Vec<Option<&Pair>> = names.iter().map(|n| theirs.get(n)).collect();
            absent.extend(names.iter().filter(|n| !theirs.contains_key(*n)).cloned());
            let expert = slots.get(EXPERT).map(|e| e.parse()).transpose();
            let expert =
                expert.map_err(|e| Error::Adapter(format!("`{name}`: number of the expert: {e}")))?;
            let ours = fill(&rule.ours, &slots, name)?;
            for (ours, pair) in ours.into_iter().zip(rule.to_ours(&pairs).map_err(|e| within(name, &e))?) {
                if all.entry(ours.clone()).or_default().insert(expert, pair).is_some() {
                    return Err(Error::Adapter(format!("two modules would be `{ours}`")));
                }
            }
            done.extend(names);
        }
        let all = all.into_iter().map(|(name, experts)| Ok((name.clone(), together(&name, experts)?)));
        Ok((all.collect::<Result<_>>()?, absent))
    }

    /// The first rule that fits, and what stands in its braces.
    fn find<'a>(
        &'a self,
        name: &str,
        side: impl Fn(&'a Rule) -> &'a Vec<Pattern>,
    ) -> Result<(&'a Rule, Slots)> {
        let fits = |rule: &'a Rule| Some((rule, side(rule).iter().find_map(|p| p.slots(name))?));
        self.rules.iter().find_map(fits).ok_or_else(|| Error::Adapter(format!("no rule for module `{name}`")))
    }
}

/// Rules of a layout: our names, theirs, how rows lie; and the one for all other modules. Kept by those who ask, as patterns take longer
/// to make than to use.
fn built_in(rules: &[(&[&str], &[&str], Rows)]) -> Vec<Rule> {
    let patterns = |names: &[&str]| -> Vec<Pattern> {
        names.iter().map(|n| Pattern::new(n).expect("a pattern of ours")).collect()
    };
    let rule = |(ours, theirs, rows): &(&[&str], &[&str], Rows)| Rule {
        ours: patterns(ours),
        theirs: patterns(theirs),
        rows: rows.clone(),
    };
    let others: (&[&str], &[&str], Rows) = (&["{*}"], &["{*}"], Rows::Behind);
    rules.iter().chain([&others]).map(rule).collect()
}

/// Pairs of the experts of a module, or of a plain one, as its tensors.
fn together(name: &str, experts: BTreeMap<Option<usize>, Pair>) -> Result<Lora> {
    let bad = |what: String| Err(Error::Adapter(format!("`{name}`: {what}")));
    let numbers: Vec<Option<usize>> = experts.keys().copied().collect();
    let pairs: Vec<Pair> = experts.into_values().collect();
    if numbers == [None] {
        return stack(&[1], &pairs);
    }
    let absent: Vec<String> =
        (0..pairs.len()).filter(|i| !numbers.contains(&Some(*i))).map(|i| i.to_string()).collect();
    if !absent.is_empty() {
        return bad(format!(
            "its experts are not numbered 0 to {}: there is no {}",
            pairs.len() - 1,
            some_of(&absent)
        ));
    }
    let sides = |p: &Pair| (p.a.ncols(), p.b.nrows());
    if let Some(other) = pairs.iter().find(|p| sides(p) != sides(&pairs[0])) {
        return bad(format!("its experts differ: {:?} and {:?} in and out", sides(&pairs[0]), sides(other)));
    }
    // One that was never trained may have been taken for blocks of half the rank.
    let rank = pairs.iter().map(Pair::rank).max().unwrap_or(0);
    // Now, as small ones would take its memory.
    check_range("rank", rank, 1..=AdapterSpec::MAX_RANK)?;
    let pairs: Vec<Pair> = pairs.iter().map(|p| p.with_rank(rank)).collect();
    stack(&[1, pairs.len()], &pairs)
}

/// All of `names`, or an error that tells which are missing beside the others.
fn present<'a, T>(names: &[String], get: impl Fn(&str) -> Option<&'a T>) -> Result<Vec<&'a T>> {
    let absent: Vec<&String> = names.iter().filter(|n| get(n).is_none()).collect();
    if !absent.is_empty() {
        let what = format!("{} belong together, but there is no {}", some_of(names), some_of(&absent));
        return Err(Error::Adapter(what));
    }
    Ok(names.iter().filter_map(|n| get(n)).collect())
}

fn fill(patterns: &[Pattern], slots: &Slots, name: &str) -> Result<Vec<String>> {
    let all: Option<Vec<String>> = patterns.iter().map(|p| p.fill(slots)).collect();
    all.ok_or_else(|| Error::Adapter(format!("the rule for `{name}` does not tell the other name")))
}

fn within(name: &str, error: &Error) -> Error {
    match error {
        Error::Adapter(what) => Error::Adapter(format!("`{name}`: {what}")),
        other => Error::Adapter(format!("`{name}`: {other}")),
    }
}

impl Rule {
    /// Are our modules grouped ones?
    fn grouped(&self) -> bool {
        self.theirs.iter().any(|p| p.has(EXPERT))
    }

    fn rows(&self) -> Result<Option<&[usize]>> {
        match &self.rows {
            Rows::Behind => Ok(None),
            Rows::Groups(rows) => Ok(Some(rows)),
            Rows::Unknown => Err(Error::Adapter(
                "q, k and v lie in this module in groups that its shape does not tell; give their rows in one group (qkv rows), e.g. \
                 512, 128, 128 for 4 heads of 128 channels to a key/value head, or the rows of all q, all k and all v for plain \
                 [q | k | v]"
                    .into(),
            )),
        }
    }

    fn to_theirs(&self, pairs: Vec<Pair>) -> Result<Vec<Pair>> {
        match (self.ours.len(), self.theirs.len()) {
            (1, 1) => Ok(pairs),
            (1, parts) => layout::split(&pairs[0], parts, self.rows()?),
            _ => Ok(vec![layout::blocks(&pairs, self.rows()?)?]),
        }
    }

    fn to_ours(&self, pairs: &[Option<&Pair>]) -> Result<Vec<Pair>> {
        match (self.ours.len(), self.theirs.len(), pairs) {
            (1, 1, &[Some(pair)]) => Ok(vec![pair.clone()]),
            (parts, 1, &[Some(pair)]) => layout::unblock(pair, parts, self.rows()?),
            _ => Ok(vec![layout::join(pairs, self.rows()?)?]),
        }
    }

    fn check(&self) -> Result<()> {
        let texts = || self.ours.iter().chain(&self.theirs).map(|p| p.text.as_str()).collect::<Vec<_>>();
        let bad = |what: &str| Err(Error::Config(format!("module map: {}: {what}", some_of(&texts()))));
        let parts = match (self.ours.len(), self.theirs.len()) {
            (1, n) | (n, 1) if n > 0 => n,
            _ => return bad("one side must be a single module"),
        };
        if let Rows::Groups(rows) = &self.rows
            && (rows.len() != parts || parts == 1 || rows.iter().any(|n| !(1..=MAX_ROWS).contains(n)))
        {
            return bad(&format!(
                "rows {rows:?} must be a number from 1 to {MAX_ROWS} for each of two parts or more"
            ));
        }
        let ours = self.ours[0].slot_names();
        if ours.contains(EXPERT) || self.ours.iter().any(|p| p.slot_names() != ours) {
            return bad("our names must have the same braces, and no {expert}");
        }
        let mut theirs = self.theirs[0].slot_names();
        if self.theirs.iter().any(|p| p.slot_names() != theirs) {
            return bad("their names must have the same braces");
        }
        theirs.remove(EXPERT);
        if ours != theirs {
            return bad("what is in braces must be the same on both sides, but for {expert}");
        }
        Ok(())
    }
}

type Slots = BTreeMap<String, String>;

/// A name with numbers left open: `blocks.{layer}.attn`. `{*}` is any text.
#[derive(Clone, Debug)]
struct Pattern {
    text: String,
    parts: Vec<Part>,
    regex: Regex,
    /// The same for flattened names; none with `{*}`, which can't be told from what follows it there.
    flat: Option<Regex>,
}

#[derive(Clone, Debug)]
enum Part {
    Text(String),
    Slot(String),
}

impl Pattern {
    fn new(text: &str) -> Result<Self> {
        let bad = |what: &str| Error::Config(format!("module map: name `{text}` {what}"));
        let mut parts = Vec::new();
        let mut rest = text;
        while let Some((before, after)) = rest.split_once('{') {
            let (slot, after) = after.split_once('}').ok_or_else(|| bad("has a brace that is not closed"))?;
            let word = !slot.is_empty() && slot.bytes().all(|b| b.is_ascii_alphabetic() || b == b'_');
            if !word && slot != "*" {
                return Err(bad("has something other than a word in braces"));
            }
            parts.push(Part::Text(before.to_owned()));
            parts.push(Part::Slot(slot.to_owned()));
            rest = after;
        }
        parts.push(Part::Text(rest.to_owned()));
        let regex = |text: &dyn Fn(&str) -> String| {
            let part = |p: &Part| match p {
                Part::Text(t) => regex::escape(&text(t)),
                Part::Slot(s) if s == "*" => "(?<any>.*)".to_owned(),
                Part::Slot(s) => format!("(?<{s}>[0-9]+)"),
            };
            let source: String = parts.iter().map(part).collect();
            Regex::new(&format!("^{source}$"))
                .map_err(|_| bad("has the same word in braces twice, or is too long"))
        };
        let any = parts.iter().any(|p| matches!(p, Part::Slot(s) if s == "*"));
        let flat = if any { None } else { Some(regex(&|t| t.replace('.', "_"))?) };
        Ok(Self { text: text.to_owned(), regex: regex(&str::to_owned)?, flat, parts })
    }

    fn slots(&self, name: &str) -> Option<Slots> {
        slots_of(&self.regex, name)
    }

    fn fill(&self, slots: &Slots) -> Option<String> {
        let part = |p: &Part| match p {
            Part::Text(text) => Some(text.clone()),
            Part::Slot(slot) => slots.get(if slot == "*" { "any" } else { slot }).cloned(),
        };
        self.parts.iter().map(part).collect()
    }

    fn slot_names(&self) -> HashSet<&str> {
        fn slot(part: &Part) -> Option<&str> {
            if let Part::Slot(slot) = part { Some(slot) } else { None }
        }
        self.parts.iter().filter_map(slot).collect()
    }

    fn has(&self, slot: &str) -> bool {
        self.slot_names().contains(slot)
    }
}

fn slots_of(regex: &Regex, name: &str) -> Option<Slots> {
    let captures = regex.captures(name)?;
    let slot = |n: &str| Some((n.to_owned(), captures.name(n)?.as_str().to_owned()));
    Some(regex.capture_names().flatten().filter_map(slot).collect())
}
