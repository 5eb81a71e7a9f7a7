// The language is in emulator.h, which the compiler includes by itself.
#pragma once
