// The little that these tests need of a test library.
#pragma once

#include <cstdio>
#include <map>
#include <string>
#include <vector>

struct Test {
    const char *area, *name;
    void (*run)();
};

std::vector<Test> &tests();
void fail(const char *file, int line, const std::string &what);

struct Registered {
    Registered(const char *area, const char *name, void (*run)()) { tests().push_back({area, name, run}); }
};

#define TEST(AREA, NAME)                                                                                               \
    static void NAME();                                                                                                \
    static const Registered registered_##NAME{#AREA, #NAME, NAME};                                                     \
    static void NAME()

#define CHECK(CONDITION)                                                                                               \
    if (!(CONDITION)) fail(__FILE__, __LINE__, #CONDITION)

// That `CODE` throws TYPE, and that its message contains WORDS.
#define CHECK_THROWS(TYPE, WORDS, CODE)                                                                                \
    try {                                                                                                              \
        CODE;                                                                                                          \
        fail(__FILE__, __LINE__, std::string("nothing was thrown, expected: ") + WORDS);                               \
    } catch (const TYPE &error) {                                                                                      \
        if (std::string(error.what()).find(WORDS) == std::string::npos) fail(__FILE__, __LINE__, error.what());        \
    }
