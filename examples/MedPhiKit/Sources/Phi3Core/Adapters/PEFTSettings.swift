import Foundation

/// The parts of PEFT's `adapter_config.json` that give tensors their meaning.
struct PEFTSettings {
    var r = 0
    var alpha = 0.0
    var isRankStabilised = false
    var isDoRA = false
    var dropout = 0.0
    var ranks: [(pattern: PEFTPattern, value: Double)] = []
    var alphas: [(pattern: PEFTPattern, value: Double)] = []

    // Settings that may say anything: they do not change what the tensors mean.
    private static let free: Set<String> = [
        "alpha_pattern", "auto_mapping", "base_model_name_or_path", "eva_config",
        "exclude_modules", "fine_tune_type", "inference_mode", "layers_pattern",
        "layers_to_transform", "lora_alpha", "lora_dropout", "lora_parameters", "medphi",
        "megatron_core", "num_layers", "peft_version", "qalora_group_size", "r", "rank_pattern",
        "revision", "runtime_config", "target_modules", "task_type", "use_dora", "use_rslora",
    ]
    // Settings of which some values are computed as PEFT does. All others must be empty.
    private static let only: [String: [JSONValue]] = [
        "bias": ["none"],
        "init_lora_weights": [.bool(true), .bool(false), "gaussian", "eva"],
        "peft_type": ["LORA"],
    ]

    /// Reads the settings; what cannot be read goes to `problems`.
    init(_ config: JSONObject, _ problems: AdapterProblems) {
        for (name, value) in config {
            let bad =
                PEFTSettings.only[name].map { !$0.contains(value) }
                ?? (!PEFTSettings.free.contains(name) && value.isTruthy)
            if bad {
                problems.add(
                    "\(printable(name)) is \(value.shown), which this package does not have; "
                        + "fold the adapter into its base with PEFT")
            }
        }
        r = Int(number("r", config["r"], whole: true, problems))
        alpha = number("lora_alpha", config["lora_alpha"], whole: false, problems)
        ranks = patterns("rank_pattern", config, whole: true, problems)
        alphas = patterns("alpha_pattern", config, whole: false, problems)
        isRankStabilised = flag("use_rslora", config, problems)
        isDoRA = flag("use_dora", config, problems)
        let stated = config["lora_dropout"]
        let given = stated?.isTruthy == true ? stated : nil
        dropout = given == nil ? 0 : given?.double ?? -1
        if !(0...0.9).contains(dropout) {
            problems.add(
                "lora_dropout is \(given?.shown ?? ""), expected a number between 0 and 0.9")
        }
    }

    private func number(
        _ name: String, _ value: JSONValue?, whole: Bool, _ problems: AdapterProblems
    ) -> Double {
        let found = whole ? value?.integer.map(Double.init) : value?.double
        if let found, found > 0, !whole || found <= Double(Adapter.largestRank) { return found }
        problems.add(
            "\(name) is \(value?.shown ?? "missing"), expected a positive"
                + (whole ? " whole number up to \(Adapter.largestRank)" : " number"))
        return 1
    }

    private func flag(_ name: String, _ config: JSONObject, _ problems: AdapterProblems) -> Bool {
        guard let value = config[name], value.isTruthy else { return false }
        if value.bool == nil { problems.add("\(name) is \(value.shown), expected true or false") }
        return value.bool ?? false
    }

    private func patterns(
        _ name: String, _ config: JSONObject, whole: Bool, _ problems: AdapterProblems
    ) -> [(pattern: PEFTPattern, value: Double)] {
        guard let value = config[name], value.isTruthy else { return [] }
        guard let members = value.object else {
            problems.add("\(name) is \(value.shown), expected an object")
            return []
        }
        return members.compactMap { key, value in
            let found = number("\(name) \(printable(key))", value, whole: whole, problems)
            if let pattern = PEFTPattern(key) { return (pattern, found) }
            problems.add(
                "\(name) '\(printable(key))' is no name or pattern that is read here: letters, "
                    + "digits, _ and ., with at most \(PEFTPattern.mostRepeats) of * and +")
            return nil
        }
    }

    /// The inner size of a module's matrices.
    func rank(of module: String) -> Int {
        ranks.first { $0.pattern.matches(module) }.map { Int($0.value) } ?? r
    }

    /// The multiplier of one module.
    func scale(of module: String) -> Double {
        let own = alphas.first { $0.pattern.matches(module) }?.value ?? alpha
        return own / divisor(rank(of: module))
    }

    /// The multiplier of modules without a pattern.
    var scale: Double { alpha / divisor(r) }

    private func divisor(_ rank: Int) -> Double {
        isRankStabilised ? Double(rank).squareRoot() : Double(rank)
    }
}

/// A name of PEFT's `rank_pattern` and `alpha_pattern`: letters, digits, `_`, `.`, `\.` and `\d`,
/// some of them repeated. Any other regular expression from a file could take forever to match.
struct PEFTPattern {
    static let mostRepeats = 2, longest = 200

    private enum Atom {
        case byte(UInt8)
        case any, digit

        func matches(_ byte: UInt8) -> Bool {
            switch self {
            case .byte(let own): return byte == own
            case .any: return true
            case .digit: return (0x30...0x39).contains(byte)
            }
        }
    }

    private var atoms: [(atom: Atom, least: Int, repeats: Bool)] = []
    private var isAnchored = false

    /// A pattern, or `nil` for a text that is none of these.
    init?(_ text: String) {
        var bytes = Array(text.utf8)[...]
        guard bytes.count <= PEFTPattern.longest else { return nil }
        if bytes.first == UInt8(ascii: "^") {
            isAnchored = true
            bytes = bytes.dropFirst()
        }
        if bytes.last == UInt8(ascii: "$") { bytes = bytes.dropLast() }
        var repeats = 0
        while let byte = bytes.popFirst() {
            var atom: Atom
            switch byte {
            case UInt8(ascii: "."): atom = .any
            case UInt8(ascii: "\\"):
                switch bytes.popFirst() {
                case UInt8(ascii: "."): atom = .byte(UInt8(ascii: "."))
                case UInt8(ascii: "d"): atom = .digit
                default: return nil
                }
            case 0x30...0x39, 0x41...0x5A, 0x61...0x7A, UInt8(ascii: "_"): atom = .byte(byte)
            default: return nil
            }
            let mark = bytes.first
            if mark == UInt8(ascii: "*") || mark == UInt8(ascii: "+") {
                bytes = bytes.dropFirst()
                repeats += 1
                atoms.append((atom, mark == UInt8(ascii: "+") ? 1 : 0, true))
            } else {
                atoms.append((atom, 1, false))
            }
        }
        guard !atoms.isEmpty, repeats <= PEFTPattern.mostRepeats else { return nil }
    }

    /// Whether the pattern is the whole name or its end after a dot, as PEFT's `get_pattern_key`.
    func matches(_ name: String) -> Bool {
        let bytes = Array(name.utf8)
        let starts = [0] + bytes.indices.filter { bytes[$0] == UInt8(ascii: ".") }.map { $0 + 1 }
        return starts.contains { start in
            (!isAnchored || start == 0) && matches(bytes[start...], atoms[...])
        }
    }

    private func matches(
        _ bytes: ArraySlice<UInt8>, _ atoms: ArraySlice<(atom: Atom, least: Int, repeats: Bool)>
    ) -> Bool {
        guard let first = atoms.first else { return bytes.isEmpty }
        let rest = atoms.dropFirst()
        let most = first.repeats ? bytes.count : 1
        var taken = 0
        while true {
            if taken >= first.least, matches(bytes.dropFirst(taken), rest) { return true }
            guard taken < most, let next = bytes.dropFirst(taken).first, first.atom.matches(next)
            else {
                return false
            }
            taken += 1
        }
    }
}
