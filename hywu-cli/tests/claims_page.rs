//! The page of a made-up report: what it holds, what it says, and that nothing in it can break out of it.

use hywu::claims::{
    html,
    instance::{HiddenAmount, HiddenPoint},
    report::*,
    settings::Settings,
    structure,
};
use hywu_core::Philox;
use hywu_diffusion::{load_picture, save_picture, skills::filters};
use indexmap::IndexMap;
use std::path::{Path, PathBuf};

const METHODS: [(Method, &str); 7] = [
    (Method::None, "frozen backbone"),
    (Method::SharedLora, "shared LoRA, equal rank"),
    (Method::WideLora, "shared LoRA, equal parameters"),
    (Method::Full, "full fine-tuning"),
    (Method::Oracle, "a LoRA per skill, skill known"),
    (Method::Routed, "a LoRA per skill, routed"),
    (Method::Hywu, "HY-WU"),
];

/// A folder that stays, so that the page can be looked at.
fn folder(name: &str) -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    std::fs::create_dir_all(&folder).expect("a folder");
    folder
}

fn around(mean: f64, half: f64) -> Interval {
    Interval { mean, lo: mean - half, hi: mean + half }
}

/// A report on the ten pairs in which HY-WU is `lead` dB above shared weights on all skills but the first, where it is behind.
fn report(folder: &Path, lead: f64) -> Report {
    let mut settings = Settings::parse(Settings::FULL).expect("bundled");
    // More of them than the settings in the binary have.
    let more = [
        ["pixelate", "restore detail"],
        ["jpeg damage", "jpeg repair"],
        ["age", "restore faded"],
        ["flatten", "auto contrast"],
        ["black and white", "colourise"],
    ];
    settings.pairs.extend(more.map(|pair| pair.map(str::to_owned)));
    let skills = settings.skills();
    let mut random = Philox::new(4).stream(0);
    let mut normal = move || f64::from(random.normal());
    let level = |m: Method| match m {
        Method::None => 17.0,
        Method::SharedLora => 24.0,
        Method::WideLora => 24.4,
        Method::Full => 24.8,
        Method::Oracle => 24.9 + lead,
        Method::Routed => 24.0 + lead,
        Method::Hywu => 24.8 + lead,
    };
    let mut scores = Vec::new();
    let mut gains = Vec::new();
    for (k, skill) in skills.iter().map(|s| Some(s.clone())).chain([None]).enumerate() {
        let base = if skill.is_some() { 4.0 * normal() } else { 0.0 };
        let behind = if k == 0 { lead + 2.0 } else { 0.0 };
        for (method, _) in METHODS {
            let own = if method == Method::Hywu { behind } else { 0.0 };
            let psnr = around(level(method) + base - own, 0.7);
            let (ssim, distance) =
                (around(0.6 + psnr.mean / 100.0, 0.01), around(0.1 - psnr.mean / 500.0, 0.004));
            scores.push(ScoreRow { method, skill: skill.clone(), psnr, ssim, distance });
            if method != Method::Hywu {
                let gain = around(level(Method::Hywu) - level(method) - behind, 0.3);
                gains.push(GainRow { against: method, skill: skill.clone(), gain });
            }
        }
    }
    let share = |v: f64| around(v, 0.05);
    let wins = METHODS[..6].iter().flat_map(|(against, _)| {
        [Metric::Psnr, Metric::Ssim, Metric::Distance].map(|metric| WinRow {
            against: *against,
            metric,
            good: share(0.7),
            same: share(0.1),
            bad: share(0.2),
        })
    });
    let conflict =
        [(Method::Full, true), (Method::SharedLora, true), (Method::Full, false)].map(|(method, trained)| {
            let mut cosine = vec![vec![1.0; skills.len()]; skills.len()];
            for (i, j) in (0..skills.len()).flat_map(|i| (0..i).map(move |j| (i, j))) {
                let v = if i / 2 == j / 2 { -0.3 } else { 0.02 } + 0.1 * normal();
                (cosine[i][j], cosine[j][i]) = (v, v);
            }
            Conflict {
                method,
                trained,
                skills: skills.clone(),
                cosine,
                conflicting: around(-0.3, 0.05),
                all: around(0.01, 0.01),
            }
        });
    let conditions = [
        (Condition::Own, 0.0),
        (Condition::OtherSkill, 9.1),
        (Condition::OtherPhoto, 0.8),
        (Condition::Mean, 5.2),
        (Condition::TextOnly, 0.6),
        (Condition::ImageOnly, 8.0),
    ];
    // Adapters: a corner for each skill, with what the instance adds.
    let (mut points, mut adapters) = (Vec::new(), Vec::new());
    for (k, skill) in skills.iter().enumerate() {
        for photo in 0..4 {
            let mut point: Vec<f64> = (0..40).map(|_| 0.7 * normal()).collect();
            point[k] += 3.0;
            point[39] += 6.0;
            points.push(point);
            let label = AdapterLabel {
                skill: skill.clone(),
                photo,
                instruction: "fix it".into(),
                hidden: Default::default(),
            };
            adapters.push(label);
        }
    }
    let gram = ndarray::Array2::from_shape_fn((points.len(), points.len()), |(i, j)| {
        points[i].iter().zip(&points[j]).map(|(a, b)| a * b).sum::<f64>()
    });
    let structure = structure::structure(&gram, &adapters).expect("finite");
    let hidden =
        [("denoise", "sigma", 0.9), ("white balance", "ln(red/green)", 0.8), ("light up", "gain", 0.05)];
    let hidden = hidden.map(|(skill, amount, r2)| HiddenAmount {
        skill: skill.into(),
        amount: amount.into(),
        r2: around(r2, 0.08),
        component: -r2,
        points: (0..48)
            .map(|i| {
                let truth = 0.06 + 0.005 * f64::from(i);
                HiddenPoint {
                    photo: i as usize / 8,
                    truth,
                    told: truth + 0.2 * (1.0 - r2) * normal(),
                    component: truth,
                }
            })
            .collect(),
    });
    let groups: Vec<Vec<String>> = skills.chunks(4).map(<[String]>::to_vec).collect();
    let learners = [
        ("full fine-tuning", 2.0),
        ("shared LoRA", 1.5),
        ("HY-WU in sequence", 1.0),
        ("HY-WU with rehearsal", 0.2),
        ("HY-WU growing", 0.05),
    ];
    let mut rows = Vec::new();
    for (learner, fall) in learners {
        for group in 0..groups.len() {
            for stage in group..groups.len() {
                let psnr = around(26.0 - fall * (stage - group) as f64 + group as f64, 0.4);
                rows.push(ForgettingRow { learner: learner.into(), stage, group, loss: 0.01, psnr });
            }
        }
    }
    let lost: IndexMap<String, Interval> =
        learners.iter().map(|(l, fall)| ((*l).to_owned(), around(fall * 2.0, 0.2))).collect();
    let end = lost.keys().map(|l| (l.clone(), around(29.0, 0.4))).collect();
    let photo = load_picture(Path::new(env!("CARGO_MANIFEST_DIR")).join("../assets/samples/astronaut.png"))
        .expect("the sample");
    let photo = photo.resize(192, 192);
    save_picture(folder.join("target.png"), &photo, &[]).expect("writable");
    save_picture(folder.join("source.png"), &filters::fade(&photo, 0.8), &[]).expect("writable");
    save_picture(folder.join("edit.png"), &filters::gamma(&photo, 0.9), &[]).expect("writable");
    let pictures = skills.iter().map(|skill| PictureRow {
        skill: skill.clone(),
        photo: 0,
        instruction: format!("{skill}, <b>please</b>"),
        source: "source.png".into(),
        target: "target.png".into(),
        edits: METHODS.iter().map(|(m, _)| (*m, "edit.png".to_owned())).collect(),
        psnr: METHODS.iter().map(|(m, _)| (*m, level(*m))).collect(),
    });
    let report = Report {
        summary: Summary {
            hywu_vs_shared_lora_db: Some(around(lead + 0.4, 0.3)),
            hywu_vs_full_db: Some(around(lead, 0.3)),
            hywu_win_rate: Some(share(0.7)),
            shuffled_loss_db: Some(around(9.1, 0.4)),
            averaged_loss_db: Some(around(5.2, 0.4)),
            conflict_cosine: Some(around(-0.3, 0.05)),
            forgetting_db: Some(around(0.1, 0.2)),
            phrasing_accuracy: Some(around(0.96, 0.02)),
        },
        setup: Setup {
            model: "hywu-<script>alert(1)</script>".into(),
            hash: "0123abcd".into(),
            device: "two cores".into(),
            pairs: settings.pairs.clone(),
            settings,
            trained_on: vec!["a.jpg".into(), "b & c.jpg".into()],
            validated_on: vec!["d.jpg".into()],
            tested_on: ["astronaut", "cat", "coffee", "rocket", "china", "flower"]
                .map(|n| format!("{n}.png"))
                .into(),
            adapters: "adapters.safetensors".into(),
        },
        methods: METHODS
            .map(|(method, label)| MethodReport {
                method,
                label: label.into(),
                rank: Some(8),
                parameters: 1_234_567,
                lr: Some(1e-3),
            })
            .into(),
        sweep: METHODS[1..]
            .iter()
            .filter(|m| m.0 != Method::Routed)
            .flat_map(|(m, _)| {
                [3e-4f32, 1e-3, 3e-3].map(|lr| SweepRow {
                    method: *m,
                    lr,
                    steps: 200,
                    loss: (lr < 2e-3 || *m != Method::Full)
                        .then(|| 0.02 + f64::from((lr.log10() + 3.0).abs()) * 0.01),
                    chosen: lr == 1e-3,
                })
            })
            .collect(),
        curves: METHODS[1..]
            .iter()
            .map(|(m, _)| Curve {
                method: *m,
                seed: 0,
                points: (1..60).map(|s| (s * 50, 0.05 / (s as f64).sqrt() + 0.001 * level(*m))).collect(),
                validation: 0.02,
            })
            .collect(),
        quality: Quality { scores, wins: wins.collect(), gains },
        conflict: conflict.into(),
        condition: conditions
            .map(|(condition, loss)| Variant {
                condition,
                psnr: around(27.0 - loss, 0.5),
                loss: around(loss, 0.3),
            })
            .into(),
        strength: [0.0f32, 0.5, 1.0, 1.5, 2.0]
            .map(|s| StrengthRow { strength: s, psnr: around(27.0 - 9.0 * f64::from((s - 1.0).abs()), 0.5) })
            .into(),
        phrasing: skills
            .iter()
            .map(|s| PhrasingRow {
                skill: s.clone(),
                asked: 24,
                right: 23,
                taken_for: IndexMap::from([("fog".into(), 1)]),
            })
            .collect(),
        cost: METHODS
            .map(|(method, _)| Cost {
                method,
                parameters: 1_234_567,
                training_seconds: 90.0,
                adapter_ms: 12.0,
                edit_ms: 800.0,
                training_mb: Some(900.0),
                edit_mb: None,
            })
            .into(),
        forgetting: Some(Forgetting { groups, rows, end, lost }),
        adapters,
        structure,
        hidden: hidden.into(),
        pictures: pictures.collect(),
    };
    let json = serde_json::to_string(&report).expect("numbers");
    serde_json::from_str(&json).expect("what was written can be read")
}

/// The page without the bytes of its pictures, among which any word can stand.
fn without_pictures(page: &str) -> String {
    let mut parts = page.split("data:image/jpeg;base64,");
    let first = parts.next().unwrap_or_default().to_owned();
    parts.fold(first, |text, part| text + &part[part.find('"').expect("the end of the address")..])
}

/// The text of the box on top.
fn answer(page: &str) -> &str {
    let start = page.find("class=\"answer\"").expect("the box");
    &page[start..start + page[start..].find("</div>").expect("its end")]
}

#[test]
fn a_page_holds_everything_and_needs_nothing() {
    let folder = folder("claims-page");
    let report = report(&folder, 2.0);
    html::write(&report, &folder).expect("writable");
    let page = std::fs::read_to_string(folder.join(html::FILE)).expect("written");
    for id in [
        "quality",
        "skills",
        "wins",
        "pictures",
        "conflict",
        "condition",
        "structure",
        "instance",
        "forgetting",
        "phrasing",
        "cost",
        "training",
    ] {
        assert!(
            page.contains(&format!("<section id=\"{id}\">")) && page.contains(&format!("href=\"#{id}\"")),
            "{id}"
        );
    }
    assert!(page.len() < 5 << 20, "{} bytes", page.len());
    let text = without_pictures(&page);
    for foreign in ["http:", "https:", "<script", "url(", "@import", "<b>", "NaN"] {
        let place = text.find(foreign).map(|i| &text[i.saturating_sub(60)..(i + 40).min(text.len())]);
        assert!(place.is_none(), "{place:?}");
    }
    assert!(page.contains("&lt;script&gt;") && page.contains("b &amp; c.jpg"));
    // Source, truth and seven edits of every skill.
    assert_eq!(page.matches("data:image/jpeg;base64,").count(), 20 * 9);
    // Two maps of 80 points, three plots of 48.
    let spots =
        page.matches("<circle class=\"dot s").count() + page.matches("<circle class=\"ring s").count();
    assert_eq!(spots, 2 * 80 + 3 * 48);
    for tag in ["svg", "g", "text", "table", "tr", "td", "figure", "section", "div", "circle", "line", "rect"]
    {
        let (open, close) = (
            page.matches(&format!("<{tag}>")).count() + page.matches(&format!("<{tag} ")).count(),
            page.matches(&format!("</{tag}>")).count(),
        );
        assert_eq!(open, close, "<{tag}>");
    }
}

#[test]
fn words_follow_the_numbers() {
    let folder = folder("claims-words");
    let ahead = html::page(&report(&folder, 2.0), &folder).expect("a page");
    let text = answer(&ahead);
    assert!(text.contains("HY-WU edits better than every shared set of weights"), "{text}");
    assert!(text.contains("HY-WU is 2.00 dB above full fine-tuning (+1.70 to +2.30)"), "{text}");
    // The oracle is 0.1 dB ahead, within the interval.
    assert!(text.contains("HY-WU and a LoRA per skill, skill known are level"), "{text}");
    assert!(
        text.contains("shows: sigma of denoise (R² 0.90) and ln(red/green) of white balance (R² 0.80)."),
        "{text}"
    );
    assert!(text.contains("don't clearly tell gain of light up (R² 0.05)"), "{text}");
    let first = &Settings::parse(Settings::FULL).expect("bundled").skills()[0];
    assert!(text.contains(&format!("Full fine-tuning is ahead on {first} (-2.0 dB).")), "{text}");

    let behind = html::page(&report(&folder, -2.0), &folder).expect("a page");
    let text = answer(&behind);
    assert!(text.contains("HY-WU edits worse than every shared set of weights"), "{text}");
    assert!(text.contains("HY-WU is 2.00 dB below full fine-tuning"), "{text}");
    assert!(behind.matches("class=\"no\"").count() > ahead.matches("class=\"no\"").count());

    let even = html::page(&report(&folder, 0.0), &folder).expect("a page");
    let text = answer(&even);
    assert!(text.contains("better than shared LoRA, equal rank and shared LoRA, equal parameters; not clearly different from full fine-tuning"), "{text}");
}

#[test]
fn what_was_not_measured_has_no_section() {
    let folder = folder("claims-empty");
    let mut report = report(&folder, 1.0);
    report.summary = Summary::default();
    report.quality = Quality { scores: vec![], wins: vec![], gains: vec![] };
    (report.structure, report.forgetting) = (None, None);
    report.conflict.clear();
    report.condition.clear();
    report.strength.clear();
    report.hidden.clear();
    report.pictures.clear();
    let page = html::page(&report, &folder).expect("a page");
    for id in [
        "quality",
        "skills",
        "wins",
        "pictures",
        "conflict",
        "condition",
        "structure",
        "instance",
        "forgetting",
    ] {
        assert!(!page.contains(&format!("#{id}")), "{id}");
    }
    assert!(page.contains("HY-WU was not compared with shared weights.") && page.contains("id=\"training\""));
}

#[test]
fn a_picture_that_is_not_there_is_named() {
    let folder = folder("claims-lost");
    let mut report = report(&folder, 1.0);
    report.pictures[0].source = "lost.png".into();
    let message = format!("{:#}", html::page(&report, &folder).expect_err("no such file"));
    assert!(message.contains("lost.png"), "{message}");
}
