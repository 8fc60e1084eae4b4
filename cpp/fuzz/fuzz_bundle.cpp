// Manifests (sealed, so that the digest is no wall), golden samples and tokenizer files of any bytes: errors, and no crash.
#include <clip_export/bundle.hpp>
#include <clip_export/tokenizer.hpp>

#include "golden.hpp"
#include "sha256.hpp"

using namespace clip_export;

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t *data, std::size_t size) {
    if (size == 0) return 0;
    std::string bytes(reinterpret_cast<const char *>(data) + 1, size - 1);
    try {
        switch (data[0] % 4) {
        case 0: parse_manifest(bytes); break;
        case 1: parse_manifest(bytes + ",\n  \"sha256\": \"" + sha256_hex(bytes) + "\"\n}\n"); break;
        case 2: read_golden_texts(bytes, 77); break;
        default: Tokenizer(TokenizerSpec{}, bytes);
        }
    } catch (const Error &) { // what they are for
    }
    return 0;
}
