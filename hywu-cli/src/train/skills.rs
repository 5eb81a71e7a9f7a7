//! What a run teaches, and what its model was taught before.

use super::config::TrainConfig;
use crate::model::{ModelInfo, SkillInfo};
use anyhow::{Result, bail, ensure};
use hywu_diffusion::{
    EditData, KnownSkill, OwnSkill, PhotoSet, TextEncoder,
    skills::{SKILLS, Skill},
};

/// What a run teaches.
pub(super) struct Skills {
    table: Vec<usize>,
    own: Vec<OwnSkill>,
    /// What is rehearsed, and in which share of the edits.
    old: Option<(Vec<KnownSkill>, f32)>,
}

impl Skills {
    /// The skills that the config names, and of those that the model to start from knows the ones to rehearse: all that are not
    /// taught anew.
    ///
    /// # Errors
    /// Unknown skills, pairs that can't be used; names and instructions that two skills share.
    pub(super) fn open(config: &TrainConfig, parent: &ModelInfo) -> Result<Self> {
        let names = &config.data.skills;
        let table = match names.is_empty() && !config.skill.is_empty() {
            true => Vec::new(),
            false => EditData::skills(names)?,
        };
        let mut others: Vec<KnownSkill> = table.iter().copied().map(KnownSkill::Table).collect();
        let old = match config.extension {
            None => None,
            Some(extension) => {
                let mut old = parent.known_skills()?;
                old.retain(|skill| !others.contains(skill));
                others.extend(old.iter().cloned());
                Some((old, extension.share))
            }
        };
        let mut own = Vec::new();
        for skill in &config.skill {
            let same = |a: &str, b: &str| a.trim().eq_ignore_ascii_case(b.trim());
            let taken = Skill::find(&skill.name).is_some() || others.iter().any(|o| o.name() == skill.name);
            ensure!(!taken, "the skill {:?}: there is one of this name already", skill.name);
            for other in &others {
                let asked = other.phrasings();
                let shared = skill.instructions.iter().find(|i| asked.iter().any(|a| same(a, i)));
                if let Some(shared) = shared {
                    bail!(
                        "the skill {:?}: {shared:?} asks for {:?} already; one instruction can't mean both",
                        skill.name,
                        other.name()
                    );
                }
            }
            let (name, instructions) = (skill.name.clone(), skill.instructions.clone());
            own.push(OwnSkill::open(&name, &skill.pairs, &instructions)?);
            others.push(KnownSkill::Own { name, instructions });
        }
        Ok(Self { table, own, old })
    }

    /// The names of the pairs, in words: a run goes on only with the same.
    pub(super) fn pairs(&self) -> String {
        self.own.iter().map(|s| format!(", pairs of {:?} {:?}", s.name, s.pairs)).collect()
    }

    /// What the model knows after the run, and which of its generators: what was taught is in the one of this number, and where that
    /// is not the first, the rest stays where it was.
    pub(super) fn info(&self, parent: &ModelInfo, generator: usize) -> Vec<SkillInfo> {
        let mut known = parent.skills.clone();
        if let (true, Some((old, _))) = (known.is_empty(), &self.old) {
            let of = |s: &KnownSkill| SkillInfo {
                name: s.name().to_owned(),
                instructions: Vec::new(),
                generator: 1,
            };
            known = old.iter().map(of).collect();
        }
        // One generator knows everything.
        if generator == 1 {
            known.iter_mut().for_each(|skill| skill.generator = 1);
        }
        let table = self.table.iter().map(|&i| (SKILLS[i].name.to_owned(), Vec::new()));
        let own = self.own.iter().map(|s| (s.name.clone(), s.instructions.clone()));
        for (name, instructions) in table.chain(own) {
            match known.iter_mut().find(|k| k.name == name) {
                Some(again) => again.generator = generator,
                None => known.push(SkillInfo { name, instructions, generator }),
            }
        }
        known
    }

    /// Batches of them.
    ///
    /// # Errors
    /// As [`EditData::with_own`] and [`EditData::rehearsing`].
    pub(super) fn data(self, photos: PhotoSet, text: TextEncoder, seed: u64) -> Result<EditData> {
        let data = EditData::with_own(photos, self.table, self.own, text, seed)?;
        Ok(match self.old {
            Some((old, share)) => data.rehearsing(old, share)?,
            None => data,
        })
    }
}
