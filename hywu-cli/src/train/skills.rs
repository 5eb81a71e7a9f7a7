//! What a run teaches, and what its model was taught before.

use super::config::TrainConfig;
use crate::model::{ModelInfo, SkillInfo};
use anyhow::{Result, bail, ensure};
use hywu_diffusion::{
    EditData, KnownSkill, OwnSkill, PhotoSet, TextEncoder,
    skills::{SKILLS, Skill},
};

/// What a model was taught, the table's skills by their numbers.
///
/// # Errors
/// A `model.json` with a skill that is neither in the table nor has instructions.
pub fn known_skills(info: &ModelInfo) -> Result<Vec<KnownSkill>> {
    if info.skills.is_empty() {
        return Ok(EditData::skills(&[])?.into_iter().map(KnownSkill::Table).collect());
    }
    let known = |SkillInfo { name, instructions }: &SkillInfo| match Skill::find(name) {
        _ if !instructions.is_empty() => {
            Ok(KnownSkill::Own { name: name.clone(), instructions: instructions.clone() })
        }
        Some(index) => Ok(KnownSkill::Table(index)),
        None => bail!(
            "model.json of {:?}: the skill {name:?} is not in the table and has no instructions",
            info.name
        ),
    };
    info.skills.iter().map(known).collect()
}

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
        let old = match config.rehearsal {
            None => None,
            Some(rehearsal) => {
                let mut old = known_skills(parent)?;
                old.retain(|skill| !others.contains(skill));
                others.extend(old.iter().cloned());
                Some((old, rehearsal.share))
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

    /// What the model knows after the run.
    pub(super) fn info(&self, parent: &ModelInfo) -> Vec<SkillInfo> {
        let mut known = parent.skills.clone();
        if let (true, Some((old, _))) = (known.is_empty(), &self.old) {
            known = old
                .iter()
                .map(|s| SkillInfo { name: s.name().to_owned(), instructions: Vec::new() })
                .collect();
        }
        let table = self.table.iter().map(|&i| (SKILLS[i].name.to_owned(), Vec::new()));
        let own = self.own.iter().map(|s| (s.name.clone(), s.instructions.clone()));
        for (name, instructions) in table.chain(own) {
            if known.iter().all(|k| k.name != name) {
                known.push(SkillInfo { name, instructions });
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
