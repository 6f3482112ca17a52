//! Language families, the top level of the usual classifications, by ISO 639-3 code: to see what a model learned of each.
//! A code that is not here counts as `other`: nothing is guessed.

/// The family of a language.
pub fn family(code: &str) -> &'static str {
    let found = FAMILIES
        .iter()
        .find(|(_, codes)| codes.split_whitespace().any(|known| known == code));
    found.map_or("other", |(name, _)| name)
}

pub(crate) const FAMILIES: [(&str, &str); 47] = [
    (
        "Indo-European",
        "afr alb aln als asm ast awa bar bel ben bho bos bre bul cat ccp ces ckb cnr cos csa csb cym dan deu diq \
         div ell eng fao fas fra frp fry fur gla gle glg glk glv gsw guj hbs hif hin hne hrv hsb hye hyw isl ita \
         kas kmr kok ksh kur lad lat lav lij lim lit lld lmo lrc ltz lvs mag mai mar mkd mwl mxi mzn nap nds nep \
         nld nno nob nor npi nrm oci ori ory oss pan pbu pcd pdc pes pnb pol por prs pus rmn roh rom ron rue rup \
         rus san scn sco sdh sgs sin skr slk slv snd spa sqi src srd srp swe swg szl tgk tly ukr urd vec vls wln \
         ydd yid zea zza",
    ),
    (
        "Afro-Asiatic",
        "aar acm acq aeb afb aii ajp amh apc apd arb arc arq ars ary arz ayl ber dbr gaz gex gez hau heb jii kab \
         kbr mey mlt orm rif sgw shi shy sid som taq tig tir tmh tzm wal ymm zgh",
    ),
    (
        "Atlantic-Congo",
        "ada ajg aka bas bax bba bci bem bin bss bum cce cjk dag dga dua dyo efi eto ewe ewo fat fon fub fuc fuf \
         fuh fuv gaa gej gjn gur guw ibb ibo kbp kde kdh keo kik kin kmb kng kon koo kqn kqs kwn lam lia lin lns \
         lob loz lua lub lue lug lun mcp mfq mos nba nbl nde ndo ngl nku nso nya nyk nym nyn nzi pem run seh sna \
         snf sot srr ssw suk swa swb swc swh tbz tem tiv tog toi tsn tso tum twi umb ven vmw wol wwa xho xsm yao \
         yor zdj zne zul",
    ),
    ("Mande", "bam bqc dyu emk gkp kpe men mnk mwk snk sus vai"),
    (
        "Nilo-Saharan",
        "ach alz bfa bvi ddn din dip dje kau knc lot luo lwo mas nus oki shk teo",
    ),
    ("Koman", "udu"),
    ("Ijoid", "ijc ijs"),
    (
        "Austronesian",
        "ace ami ban bcl bik bjn bug ceb cha chk fij gil haw hil hnn iba ify ilo ind jav kos lew mad mah mao min \
         mlg mmn mri mrw msa niu pag pam pau plt pon rap rar smo sun tah tbc tdt tet tgl tkl ton tvl war yap zlm \
         zsm",
    ),
    (
        "Sino-Tibetan",
        "bod brx cfm cjy cmn cnh cpx ctd czh czo dzo gan hak hlt hni hsn iii kac kar ksw lus lzh mni mnp mya nan \
         new njo sit taj tji wuu yue zom",
    ),
    (
        "Turkic",
        "alt azb aze azj bak chv cjs crh gag kaa kaz kdr kir kjh klj krc kum nog sah tat tuk tur tyv uig uzb uzn",
    ),
    (
        "Uralic",
        "ekk est fin fkv hun koi kom kpv krl liv mdf mhr mrj myv nio sma sme smj smn sms udm vep vot vro yrk",
    ),
    ("Dravidian", "gon kan kfa mal tam tcy tel"),
    ("Austroasiatic", "kha khm kjg mnw pll sat vie wbm"),
    ("Tai-Kadai", "blt kkh lao nod shn tdd tha tyz zha zyb"),
    ("Hmong-Mien", "hea hmn hms hnj hnm ium mww"),
    ("Japonic", "ams jpn ryu"),
    ("Koreanic", "kor"),
    ("Mongolic", "bua bxm bxr khk mon xal"),
    ("Tungusic", "eve evn gld mnc oaa ude"),
    ("Yukaghir", "ykg yux"),
    ("Nivkh", "niv"),
    ("Kartvelian", "kat lzz xmf"),
    ("Northwest Caucasian", "abk abq ady kbd"),
    ("Northeast Caucasian", "ava che dar ddo inh lbe lez tab"),
    ("Eskimo-Aleut", "ale ess esu ike ikt ipk kal"),
    (
        "Quechuan",
        "cqu inb qub que qug quh qul quy quz qva qvc qvh qvi qvm qvn qwh qxn qxu",
    ),
    (
        "Mayan",
        "acr agu cac cak chf ctu hus ixl jac kek kjb mam mop poh quc toj tzh tzj tzo usp yua",
    ),
    (
        "Oto-Manguean",
        "amu chj cso ctz cuc mat maz mim mxv mzi ote otm zab zam zap zpu",
    ),
    ("Uto-Aztecan", "hch nah nch ncj nhe nhi nhn nhw tar yaq"),
    ("Totonacan", "tku toc too top tos"),
    ("Mixe-Zoquean", "mco mir mto zos"),
    ("Tupian", "gnw gug gui gun gyr srq yrl"),
    ("Algic", "arp bla chy ciw cre crk csw mic ojb oji pot"),
    ("Na-Dene", "apw chp dgr gwi nav scs"),
    ("Arawakan", "ame cab cni cot cpu gae guc not pib prq ter trn wap"),
    (
        "Creole or pidgin",
        "acf bah bis bzj cbk cri crs djk gcf gcr gpe hat hwc icr jam kea kri ktu mfe pap pcm pis rcf sag srm srn \
         tpi",
    ),
    ("Panoan", "amc cbr cbs kaq mcd mcf shp"),
    ("Araucanian", "arn"),
    ("Paezan", "pbb"),
    ("Barbacoan", "cbi cof gum kwi"),
    ("Yanomaman", "guu"),
    ("Jivaroan", "acu agr jiv"),
    ("Witotoan", "huu"),
    ("Boran", "boa"),
    ("Zamucoan", "ayo"),
    ("Guaicuruan", "tob"),
    ("Aymaran", "aym ayr"),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn families_are_looked_up_and_nothing_is_guessed() {
        for (code, expected) in [
            ("eng", "Indo-European"),
            ("yor", "Atlantic-Congo"),
            ("cmn", "Sino-Tibetan"),
            ("quy", "Quechuan"),
            ("tpi", "Creole or pidgin"),
            ("epo", "other"),
        ] {
            assert_eq!(family(code), expected, "{code}");
        }
    }

    #[test]
    fn no_code_is_in_two_families() {
        let mut all: Vec<&str> = FAMILIES
            .iter()
            .flat_map(|(_, codes)| codes.split_whitespace())
            .collect();
        assert!(
            all.iter().all(|code| code.len() == 3),
            "{:?}",
            all.iter().filter(|c| c.len() != 3).collect::<Vec<_>>()
        );
        all.sort_unstable();
        for pair in all.windows(2) {
            assert_ne!(pair[0], pair[1], "in two families");
        }
    }
}
