import Foundation
import MedPhiKit

/// What was typed behind a verb, sorted into places and options.
struct Arguments: Sendable {
    private let places: [String: String]
    private let values: [String: String]
    private let flags: Set<String>

    static func asksForHelp(_ words: [String]) -> Bool {
        words.prefix { $0 != "--" }.contains { $0 == "--help" || $0 == "-h" }
    }

    init(_ words: [String], _ verb: Verb) throws {
        var (values, flags, free) = ([String: String](), Set<String>(), [String]())
        var rest = words[...]
        while let word = rest.popFirst() {
            if word == "--" {
                free += rest
                break
            }
            guard word.hasPrefix("-"), word != "-" else {
                free.append(word)
                continue
            }
            let parts = word.split(separator: "=", maxSplits: 1, omittingEmptySubsequences: false)
            let option = try Arguments.option(String(parts[0]), verb)
            guard values[option.name] == nil, !flags.contains(option.name) else {
                throw UsageFailure("--\(option.name) is there twice")
            }
            guard option.value != nil else {
                if parts.count > 1 { throw UsageFailure("--\(option.name) takes no value") }
                flags.insert(option.name)
                continue
            }
            guard let value = parts.count > 1 ? String(parts[1]) : rest.popFirst() else {
                throw UsageFailure("\(option.shown): its value is missing")
            }
            values[option.name] = value
        }
        self.values = values
        self.flags = flags
        places = try Arguments.places(free, verb)
    }

    private static func option(_ typed: String, _ verb: Verb) throws -> Verb.Option {
        if let option = verb.options.first(where: { "--\($0.name)" == typed }) { return option }
        let names = verb.options.map { "--\($0.name)" } + ["--help"]
        let near = Nearest.of(typed, among: names)
        throw UsageFailure(
            "no option '\(Console.shown(typed))'; "
                + (near.map { "did you mean \($0)?" }
                    ?? "expected one of \(names.joined(separator: ", "))"))
    }

    private static func places(_ words: [String], _ verb: Verb) throws -> [String: String] {
        if words.count > verb.places.count {
            let extra = Console.shown(words[verb.places.count])
            throw UsageFailure("'\(extra)' is one word too many")
        }
        for (at, place) in verb.places.enumerated() where at >= words.count && !place.isOptional {
            throw UsageFailure("\(place.name) is missing")
        }
        return Dictionary(
            uniqueKeysWithValues: zip(verb.places, words).map { ($0.name, $1) })
    }

    /// What stands at a place.
    func place(_ name: String) -> String? { places[name] }

    /// A path at a place that must be there.
    func url(_ name: String) throws -> URL {
        let path = places[name] ?? ""
        if path.isEmpty { throw UsageFailure("\(name) is empty") }
        return URL(fileURLWithPath: path)
    }

    /// Whether an option without value is there.
    func has(_ name: String) -> Bool { flags.contains(name) }

    /// The value of an option.
    func text(_ name: String) -> String? { values[name] }

    /// Refuses an option whose value is no text at all.
    func requireFilled(_ name: String) throws {
        if values[name]?.isEmpty == true { throw UsageFailure("--\(name) is empty") }
    }

    /// A whole number.
    func whole(_ name: String, or usual: Int, _ range: ClosedRange<Int>) throws -> Int {
        guard let text = values[name] else { return usual }
        if let value = Int(text), range.contains(value) { return value }
        let expected =
            range.upperBound == .max
            ? "\(range.lowerBound) or more" : "\(range.lowerBound) to \(range.upperBound)"
        throw UsageFailure(
            "--\(name) is '\(Console.shown(text))', expected a whole number, \(expected)")
    }

    /// Any finite number; its range is the library's to check.
    func number(_ name: String, or usual: Double) throws -> Double {
        guard let text = values[name] else { return usual }
        if let value = Double(text), value.isFinite { return value }
        throw UsageFailure("--\(name) is '\(Console.shown(text))', expected a number")
    }

    /// What computes.
    func backend() throws -> BackendChoice {
        switch values["backend"] {
        case nil: return .automatic
        case "reference": return .reference
        case "coreml": return .coreML
        case .some(let other):
            throw UsageFailure(
                "--backend is '\(Console.shown(other))', expected reference or coreml")
        }
    }
}
