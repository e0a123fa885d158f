/// Readers for the sections of the manifest's `medphi` part.
enum ManifestSections {
    static func coreml(_ here: ManifestReader) -> Manifest.CoreMLFacts? {
        let functions = here.member("functions", or: [:]) { $0.map { signature($0) } }
        let units = here.section("compute_units") { here in
            (
                recommended: here.choice("recommended", or: Manifest.CoreMLFacts.Units.all),
                tried: here.texts("tried")
            )
        }
        let facts = Manifest.CoreMLFacts(
            functions: functions, defaultFunction: here.text("default_function"),
            contextLength: here.whole("context_length"), prefillWidth: here.whole("prefill_width"),
            maskValue: here.number("mask_value"), recommendedUnits: units?.recommended ?? .all,
            triedUnits: units?.tried ?? [], minOS: here.textMap("min_os"))
        return units == nil ? nil : facts
    }

    private static func signature(_ here: ManifestReader) -> Manifest.Signature? {
        guard here.isObject() else { return nil }
        return Manifest.Signature(
            inputs: here.list("inputs") { tensor($0) },
            outputs: here.list("outputs") { tensor($0) },
            states: here.list("states") { tensor($0) })
    }

    private static func tensor(_ here: ManifestReader) -> Manifest.TensorFacts? {
        guard here.isObject() else { return nil }
        return Manifest.TensorFacts(
            name: here.text("name"), shape: here.list("shape") { $0.whole() },
            type: here.choice("dtype", or: .float32))
    }

    static func model(_ here: ManifestReader) -> Manifest.ModelFacts? {
        let rope = here.section("rope") { here in
            Manifest.RopeFacts(
                kind: here.choice("type", or: .plain), theta: here.number("theta"),
                factors: here.choice("factors", or: .none),
                attentionFactor: here.number("attention_factor"),
                rotarySize: here.whole("rotary_dim"),
                switchLength: here.optionalWhole("switch_length"))
        }
        let facts = Manifest.ModelFacts(
            vocabSize: here.whole("vocab_size"), hiddenSize: here.whole("hidden_size"),
            intermediateSize: here.whole("intermediate_size"), layers: here.whole("layers"),
            heads: here.whole("heads"), kvHeads: here.whole("kv_heads"),
            headSize: here.whole("head_dim"), epsilon: here.number("eps"),
            maxPositions: here.whole("max_position_embeddings"),
            slidingWindow: here.optionalWhole("sliding_window"),
            tiedEmbeddings: here.flag("tied_embeddings"),
            rope: rope
                ?? Manifest.RopeFacts(
                    kind: .plain, theta: 0, factors: .none, attentionFactor: 0, rotarySize: 0))
        return rope == nil ? nil : facts
    }

    static func quantization(_ here: ManifestReader) -> Manifest.QuantizationFacts? {
        let embedding = here.section("embedding") { stored($0) }
        let head = here.section("head") { stored($0) }
        let none = Manifest.StoredFacts(bits: 0)
        let facts = Manifest.QuantizationFacts(
            source: here.choice("source", or: .none), scheme: here.choice("scheme", or: .block),
            bits: here.whole("bits"), group: here.optionalWhole("group"),
            offset: here.choice("offset", or: .none), embedding: embedding ?? none,
            head: head ?? none, exceptions: here.textMap("exceptions"),
            error: here.optionalNumber("error"), subnormalScales: here.whole("subnormal_scales"))
        return embedding == nil || head == nil ? nil : facts
    }

    private static func stored(_ here: ManifestReader) -> Manifest.StoredFacts {
        Manifest.StoredFacts(bits: here.whole("bits"), group: here.optionalWhole("group"))
    }

    static func tokenizer(_ here: ManifestReader) -> Manifest.TokenizerFacts? {
        let format = here.section("chat_format") { here in
            Manifest.ChatFormat(
                name: here.text("name"), opening: here.text("opening"),
                closing: here.text("closing"), afterRole: here.text("after_role"),
                afterEnd: here.text("after_end"), knowsSystem: here.flag("knows_system"),
                skipsEmptySystem: here.flag("skips_empty_system"))
        }
        let pipeline = here.constant("pipeline", "tokenizer.json")
        let path = here.text("path")
        let sha256 = here.text("sha256")
        let template = here.text("chat_template")
        let hash = here.text("chat_template_sha256")
        let vectors = here.text("vectors")
        guard let format else { return nil }
        return Manifest.TokenizerFacts(
            pipeline: pipeline, path: path, sha256: sha256, chatTemplate: template,
            chatTemplateSHA256: hash, chatFormat: format, vectors: vectors)
    }

    static func generation(_ here: ManifestReader) -> Manifest.GenerationFacts {
        Manifest.GenerationFacts(
            stopTokenIDs: here.list("stop_token_ids") { $0.whole() },
            specialTokenIDs: here.member("special_token_ids", or: [:]) { $0.map { $0.whole() } },
            suppressRanges: here.list("suppress_ranges") { range($0) },
            defaults: here.anyObject("defaults"))
    }

    private static func range(_ here: ManifestReader) -> ClosedRange<Int>? {
        let ends = here.list { $0.whole() }
        if ends.count == 2, ends[0] <= ends[1] { return ends[0]...ends[1] }
        if here.value.array != nil {
            here.problems.lines.append(
                "\(here.path) is no range of two ids, the first not above the last")
        }
        return nil
    }

    static func adapters(_ here: ManifestReader) -> Manifest.Adapters {
        Manifest.Adapters(
            mode: here.choice("mode", or: .none),
            slotKind: here.member("slot_kind", or: nil) { $0.optional { $0.choice(or: .state) } },
            rankSlot: here.optionalWhole("rank_slot"), modules: here.texts("modules"),
            list: here.list("list") { adapter($0) })
    }

    private static func adapter(_ here: ManifestReader) -> Manifest.Adapters.Entry? {
        guard here.isObject() else { return nil }
        return Manifest.Adapters.Entry(
            name: here.text("name"), path: here.optionalText("path"),
            sha256: here.optionalText("sha256"), rank: here.whole("rank"),
            functions: here.textMap("functions"), training: here.anyObject("training"))
    }

    static func verification(_ here: ManifestReader) -> Manifest.Verification {
        var figures: [Manifest.Verification.Level: JSONObject] = [:]
        for level in Manifest.Verification.Level.allCases where level != .none {
            figures[level] = here.member(level.rawValue, or: nil) { $0.optional { $0.anyObject() } }
        }
        return Manifest.Verification(level: here.choice("level", or: .none), figures: figures)
    }

    static func file(_ here: ManifestReader) -> Manifest.FileEntry? {
        guard here.isObject() else { return nil }
        return Manifest.FileEntry(
            path: here.text("path"), bytes: here.whole("bytes"), sha256: here.text("sha256"))
    }
}
