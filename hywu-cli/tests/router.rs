//! Which generator answers: skills told apart by words that they were not taught in.

use hywu::model::Model;
use hywu_diffusion::{
    KnownSkill, Router,
    skills::{SKILLS, Skill},
};

/// Ways to put a request that training does not know.
const ASKED: [&str; 3] = ["{}", "could you {} for me", "i want you to {}"];

#[test]
fn instructions_find_their_skill() {
    let model = Model::bundled().expect("in the binary");
    let own = KnownSkill::Own {
        name: "slide".into(),
        instructions: ["cross process it", "cross-processed", "give it the cross processing look"]
            .map(str::to_owned)
            .into(),
    };
    let skills: Vec<KnownSkill> = (0..SKILLS.len()).map(KnownSkill::Table).chain([own]).collect();
    let router = Router::new(&skills, &model.backbone, &model.text).expect("phrasings that fit");
    let ask = |phrases: &[(usize, &str)]| -> Vec<(usize, usize)> {
        let (mut ids, mut wanted) = (Vec::new(), Vec::new());
        for (skill, phrase) in phrases {
            for asked in ASKED {
                let said = asked.replace("{}", &phrase.replace("{from}", "red").replace("{to}", "blue"));
                ids.extend(model.text.encode(&said).expect("short"));
                wanted.push(*skill);
            }
        }
        wanted.into_iter().zip(router.nearest(&model.backbone, &ids).expect("they fit")).collect()
    };
    let held_out: Vec<(usize, &str)> =
        SKILLS.iter().enumerate().flat_map(|(i, s)| s.held_out.iter().map(move |p| (i, *p))).collect();
    let found = ask(&held_out);
    let right = found.iter().filter(|(wanted, got)| wanted == got).count();
    assert!(right * 100 >= 95 * found.len(), "{right} of {}", found.len());
    let own = SKILLS.len();
    let taken = found.iter().filter(|(_, got)| *got == own).count();
    assert!(taken * 200 <= found.len(), "{taken} of {} taken for the own skill", found.len());
    let mine =
        ask(&[(own, "cross process this photo"), (own, "apply cross processing"), (own, "cross process it")]);
    assert!(mine.iter().all(|(wanted, got)| wanted == got), "{mine:?}");
    // Another order of the skills is another order of the answers, and examples can be kept.
    let fog = Skill::find("fog").expect("in the table");
    let turned: Vec<KnownSkill> = skills.into_iter().rev().collect();
    let turned = Router::new(&turned, &model.backbone, &model.text).expect("phrasings that fit");
    let kept = Router::from_examples(turned.examples(), turned.counts().to_vec(), &model.backbone)
        .expect("they fit");
    let ids = model.text.encode("make it foggy").expect("short");
    assert_eq!(router.nearest(&model.backbone, &ids).expect("they fit"), [fog]);
    assert_eq!(kept.nearest(&model.backbone, &ids).expect("they fit"), [own - fog]);
    let fewer = turned.counts()[1..].to_vec();
    assert!(Router::from_examples(turned.examples(), fewer, &model.backbone).is_err());
    assert!(router.nearest(&model.backbone, &ids[1..]).is_err());
}
