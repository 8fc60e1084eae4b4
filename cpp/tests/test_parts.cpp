// Pieces that have an answer of their own; what has to equal Python is compared with Python, in tests/test_cpp_*.py.
#include "bpe.hpp"
#include "checks.hpp"
#include "json.hpp"
#include "profiles.hpp"
#include "sha256.hpp"
#include "unicode.hpp"

#include <clip_export/preprocess.hpp>
#include <clip_export/tokenizer.hpp>

using namespace clip_export;

TEST(parts, sha256_of_the_standard) {
    CHECK(sha256_hex("") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
    CHECK(sha256_hex("abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
    CHECK(sha256_hex("abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq") ==
          "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1");
    Sha256 sha; // a million letters, in pieces that do not fit blocks
    std::string piece(997, 'a');
    for (std::size_t left = 1000000; left;) {
        std::size_t count = std::min(left, piece.size());
        sha.update(piece.data(), count);
        left -= count;
    }
    CHECK(sha.hex() == "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0");
}

TEST(parts, utf8) {
    CHECK(unicode::encode(unicode::decode("a\u00e9\u4e00\U0001f600").text) == "a\u00e9\u4e00\U0001f600");
    for (const char *bad : {"\x80", "\xC0\x80", "\xC3", "\xE0\x80\x80", "\xED\xA0\x80", "\xF0\x80\x80\x80", "\xF4\x90\x80\x80",
                            "\xF8\x88\x80\x80\x80", "\xE2\x82"}) {
        CHECK(unicode::decode(bad).invalid_at.value_or(99) == 0);
    }
    CHECK(unicode::decode("ab\xFF").invalid_at.value_or(99) == 2);
}

TEST(parts, json_is_strict) {
    CHECK(parse_json("{\"b\": 1, \"a\": [2.5, null, \"x\"]}", true).dump() == "{\"b\":1,\"a\":[2.5,null,\"x\"]}");
    CHECK(parse_json("{\"a\": 1, \"a\": 2}", false)["a"] == 2);
    CHECK_THROWS(JsonError, "duplicate key 'a'", parse_json("{\"a\": 1, \"a\": 2}", true));
    CHECK_THROWS(JsonError, "out of range", parse_json("9223372036854775808", true));
    CHECK_THROWS(JsonError, "1e999 is out of range", parse_json("1e999", true));
    CHECK_THROWS(JsonError, "999999999999999999999999 is out of range", parse_json(std::string(400, '9'), true));
    for (std::string word : {"NaN", "Infinity", "-Infinity"}) {
        CHECK_THROWS(JsonError, word + " is not a number", parse_json("{\"a\": [1, " + word + "]}", true));
    }
    CHECK_THROWS(JsonError, "half of a surrogate pair", parse_json("[\"\\ud800\"]", true));
    CHECK_THROWS(JsonError, "half of a surrogate pair", parse_json("[\"\\udc00\"]", true));
    CHECK_THROWS(JsonError, "it is not UTF-8: byte 2 begins no character", parse_json("[\"\xff\"]", true));
    CHECK_THROWS(JsonError, "byte 3 is not what may stand there", parse_json("[1,]", true));
    CHECK_THROWS(JsonError, "it ends too early", parse_json("[\"a", true));
    CHECK_THROWS(JsonError, "nested too deep", parse_json(std::string(100000, '['), true));
    for (const char *bad : {"", "{", "NaN", "{\"a\": Infinity}", "[1,]", "{} x"}) {
        CHECK_THROWS(JsonError, "", parse_json(bad, true));
    }
}

TEST(parts, merges_of_long_words_are_those_of_short_ones) {
    std::unordered_map<std::string, std::int32_t> vocabulary = {{"a", 0}, {"a</w>", 1}, {"aa", 2}, {"aaaa", 3}, {"aaa</w>", 4}};
    std::vector<std::pair<std::string, std::string>> merges = {{"a", "a"}, {"aa", "aa"}, {"aa", "a</w>"}};
    Bpe bpe(vocabulary, merges, "</w>", std::nullopt);
    for (std::size_t length : {1u, 2u, 3u, 4u, 7u, 48u, 49u, 1000u, 100000u}) {
        std::vector<std::int32_t> ids;
        bpe.encode(std::string(length, 'a'), ids);
        std::size_t letters = 0;
        for (std::int32_t id : ids) letters += id == 3 ? 4 : id == 4 ? 3 : id == 2 ? 2 : 1;
        CHECK(letters == length && ids.size() <= length / 4 + 2);
    }
    std::vector<std::int32_t> ids;
    bpe.encode("azb", ids); // no ids, and no unknown token: left out
    CHECK(ids == std::vector<std::int32_t>{0});
    CHECK_THROWS(SpecError, "vocabulary lacks", Bpe(vocabulary, {{"a", "b"}}, "</w>", std::nullopt));
}

TEST(parts, batches_are_cut_to_profiles) {
    auto profile = [](std::int64_t least, std::int64_t most) {
        return Profile{{"pixels", {{least, 3, 8, 8}, {most, 3, 8, 8}, {most, 3, 8, 8}}}};
    };
    std::vector<Profile> profiles = {profile(1, 1), profile(2, 8), profile(9, 64)};
    auto sizes = [&](std::int64_t rows) {
        std::string found;
        for (const Part &part : split(rows, profiles, {{"pixels", {3, 8, 8}}})) {
            found += std::to_string(part.rows) + "/" + std::to_string(part.size) + "@" + std::to_string(part.profile) + " ";
        }
        return found;
    };
    CHECK(sizes(1) == "1/1@0 ");
    CHECK(sizes(8) == "8/8@1 ");
    CHECK(sizes(70) == "64/64@2 6/6@1 ");
    CHECK(sizes(100) == "50/50@2 50/50@2 ");
    CHECK_THROWS(InputError, "expected 8 on axis 2, found 9", split(1, profiles, {{"pixels", {3, 9, 8}}}));
}

TEST(parts, images_that_are_none) {
    PreprocessSpec spec;
    Preprocessor preprocess(spec);
    std::vector<std::uint8_t> levels(300 * 300 * 3);
    CHECK(preprocess({levels.data(), 300, 300, 3, 0}).size() == 3 * 224 * 224);
    CHECK_THROWS(ImageError, "a uint8 array [0, 5, 3] has 0 pixels", preprocess({levels.data(), 5, 0, 3, 0}));
    CHECK_THROWS(ImageError, "found a uint8 array [5, 5, 2]", preprocess({levels.data(), 5, 5, 2, 0}));
    CHECK_THROWS(ImageError, "null pointer", preprocess({nullptr, 5, 5, 3, 0}));
    CHECK_THROWS(ImageError, "stride", preprocess({levels.data(), 5, 5, 3, 14}));
    CHECK_THROWS(ImageError, "more pixels than any image", preprocess({levels.data(), INT64_MAX, 5, 3, 0}));
    CHECK_THROWS(ImageError, "over Pillow's limit of 89478485", preprocess({levels.data(), 1, 60000, 3, 0}));
    CHECK_THROWS(ImageError, "over Pillow's limit", check_image_size("x", 1 << 20, 1 << 20));
    CHECK_THROWS(ImageError, "over Pillow's limit", check_image_size("x", INT64_MAX, INT64_MAX));
}

TEST(parts, tokenizer_json_that_is_none) {
    TokenizerSpec spec;
    for (const char *bad : {"", "[]", "{}", "{\"model\": {}}", "{\"model\": {\"type\": \"WordPiece\"}, \"added_tokens\": []}",
                            "{\"model\": {\"type\": \"BPE\", \"vocab\": [], \"merges\": 3, \"end_of_word_suffix\": null}}"}) {
        CHECK_THROWS(SpecError, "the tokenizer JSON cannot be read", Tokenizer(spec, bad));
    }
}

TEST(parts, tokenizer_ids_that_are_none) {
    TokenizerSpec spec;
    for (const char *id : {"1099511627776", "2147483648", "1.5e300", "1.5", "-1", "true", "\"1\"", "18446744073709551615"}) {
        std::string json = R"({"model": {"type": "BPE", "vocab": {"a": )" + std::string(id) +
                           R"(}, "merges": [], "end_of_word_suffix": null}, "added_tokens": []})";
        CHECK_THROWS(SpecError, "expected an id from 0 to 2147483647, found ", Tokenizer(spec, json));
    }
    const char *merges = R"({"model": {"type": "BPE", "vocab": {}, "merges": [3], "end_of_word_suffix": null}, "added_tokens": []})";
    CHECK_THROWS(SpecError, "of another type than in a tokenizer of CLIP", Tokenizer(spec, merges));
}
