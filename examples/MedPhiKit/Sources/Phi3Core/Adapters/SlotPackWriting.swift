import Foundation

extension SlotPack {
    /// Writes an adapter as the slot pack of a bundle; the same adapter gives the same bytes.
    ///
    /// - Parameters:
    ///   - adapter: one that was loaded for this bundle.
    ///   - name: what an app asks for.
    ///   - manifest: the bundle's.
    ///   - url: the file; nothing may be there.
    /// - Throws: `Phi3Error`: it does not fit the slots, changes nothing, or a full disk.
    static func write(
        _ adapter: Adapter, name: String, for manifest: Manifest, to url: URL
    ) throws {
        let target = AdapterTarget(manifest)
        let slots = try AdapterSlots(adapter, for: target).slots
        let sites = sites(slots)
        if sites.isEmpty {
            throw Adapter.refused(
                adapter.url, "cannot be added to the bundle",
                ["it is all zeros in half precision, which is the base itself"],
                advice: "Leave it out.")
        }
        let pieces = slots.map { slot in
            let bytes = slot.bits.map(\.littleEndian).withUnsafeBytes { Data($0) }
            return TensorPiece(
                name: slot.name, Tensor(type: .f16, shape: slot.shape, data: bytes))
        }
        var hash = SHA256()
        for piece in pieces { try piece.chunks { hash.update($0) } }
        var facts = facts(adapter, name, manifest, sites)
        facts["tensors_sha256"] = hash.hexDigest()
        let metadata = facts.sorted { $0.key < $1.key }.map { (name: $0.key, text: $0.value) }
        try SafetensorsWriter.write(to: url, pieces: pieces, metadata: metadata)
    }

    /// Where an adapter changes anything once it is rounded to half precision.
    private static func sites(_ slots: [AdapterSlots.Slot]) -> Set<ProjectionSite> {
        var sites: Set<ProjectionSite> = []
        for projection in Projection.allCases {
            let (a, b) = names(projection)
            for slot in slots where slot.name == a || slot.name == b {
                let width = slot.shape[1] * slot.shape[2]
                for layer in 0..<slot.shape[0] {
                    let bits = slot.bits[layer * width..<(layer + 1) * width]
                    if bits.contains(where: { $0 & 0x7FFF != 0 }) {
                        sites.insert(ProjectionSite(layer: layer, projection: projection))
                    }
                }
            }
        }
        return sites
    }

    private static func facts(
        _ adapter: Adapter, _ name: String, _ manifest: Manifest, _ sites: Set<ProjectionSite>
    ) -> [String: String] {
        let origin = adapter.origin
        let layers = Set(sites.map(\.layer)).sorted().map { JSONValue.integer($0) }
        let modules = Set(sites.map(\.projection)).sorted().map { JSONValue.string($0.module) }
        let values: [String: JSONValue] = [
            "base_fingerprint_stated": .bool(origin.baseFingerprint != nil),
            "base_quantization": origin.baseQuantization.map { .object($0) } ?? .null,
            "dropout": .number(adapter.scaling.dropout), "layers": .array(layers),
            "modules": .array(modules), "rank": .integer(adapter.scaling.rank),
            "rank_slot": .integer(manifest.medphi.adapters.rankSlot ?? 0),
            "scale_folded": .bool(true), "training": .object(origin.training),
        ]
        let fingerprint = origin.baseFingerprint ?? manifest.medphi.baseFingerprint
        var facts = values.mapValues { $0.text(.line) }
        facts["base_fingerprint"] = fingerprint.text
        facts["base_id"] = manifest.source.modelID
        facts["chat_template_sha256"] = manifest.medphi.tokenizer.chatTemplateSHA256
        facts["dtype"] = TensorType.f16.rawValue
        facts["format"] = format
        facts["name"] = name
        facts["package_version"] = Adapter.writer
        facts["source_format"] = adapter.form.rawValue
        facts["tokenizer_sha256"] = manifest.medphi.tokenizer.sha256
        return facts
    }
}
