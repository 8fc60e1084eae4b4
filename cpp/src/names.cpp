#include <clip_export/spec.hpp>

namespace clip_export {

const char *name_of(Tower tower) { return tower == Tower::text ? "text" : "image"; }

const char *name_of(Dialect dialect) {
    return dialect == Dialect::openai ? "openai" : dialect == Dialect::open_clip ? "open_clip" : "huggingface";
}

} // namespace clip_export
