// Included before all else in llama.cpp's Vulkan backend. It wants the headers of Vulkan 1.3.272 for one structure, which
// only a validation layer reads; Debian 12 has those of 1.3.239. What is missing is declared here as the specification of
// VK_EXT_layer_settings lays it out.
#pragma once

#include <vulkan/vulkan_core.h>

#if VK_HEADER_VERSION < 272

#include <cstdint>
#include <vector>

namespace vk {

enum class LayerSettingTypeEXT { eBool32 = 0 };

struct LayerSettingEXT {
    const char * layer;
    const char * name;
    LayerSettingTypeEXT type;
    uint32_t count;
    const void * values;
};

struct LayerSettingsCreateInfoEXT {
    explicit LayerSettingsCreateInfoEXT(const std::vector<LayerSettingEXT> & all)
        : count(static_cast<uint32_t>(all.size())), settings(all.data()) {}

    VkStructureType type = static_cast<VkStructureType>(1000496000);
    const void * next = nullptr;
    uint32_t count;
    const LayerSettingEXT * settings;
};

} // namespace vk

#endif
