#include "checks.hpp"

namespace {
int failures = 0;
}

std::vector<Test> &tests() {
    static std::vector<Test> all;
    return all;
}

void fail(const char *file, int line, const std::string &what) {
    std::fprintf(stderr, "%s:%d: %s\n", file, line, what.c_str());
    ++failures;
}

int main(int count, char **arguments) {
    int passed = 0, failed = 0;
    for (const Test &test : tests()) {
        if (count > 1 && std::string(arguments[1]) != test.area) continue;
        int before = failures;
        test.run();
        (failures == before ? passed : failed) += 1;
        if (failures != before) std::fprintf(stderr, "FAILED %s: %s\n", test.area, test.name);
    }
    std::printf("%d passed, %d failed\n", passed, failed);
    return failed || !passed;
}
