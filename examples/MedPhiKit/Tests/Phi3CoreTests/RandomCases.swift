import Foundation

@testable import Phi3Core

/// The random texts, ids and chats of tests/fixtures/make_swift_random.py: made here as there, from
/// the seed, words and rules that a file of digests names.
struct RandomCases {
    /// The sha256 of the tokenizer.json whose answers the file holds.
    let tokenizerSHA256: String
    let tokenizer: Tokenizer

    private let value: JSONValue
    private let seed: UInt64
    private let pools: [[String]]
    private let ranges: [[Int]]
    private let styles: [[Int]]
    private let entries: [String]
    private let bytes: [Int32]
    private let added: [Int32]

    private static let scalar = 5
    private static let entry = 6
    private static let digits = 8

    /// What a file of the recorded folder says, or of the folder that MEDPHI_RANDOM names.
    init(_ name: String, _ tokenizer: Tokenizer) throws {
        value = try JSONValue(parsing: Data(contentsOf: RandomCases.file(name)))
        self.tokenizer = tokenizer
        tokenizerSHA256 = value["tokenizer_sha256"]?.string ?? ""
        seed = UInt64(value["seed"]?.integer ?? 0)
        pools = (value["pools"]?.array ?? []).map { ($0.array ?? []).compactMap(\.string) }
        ranges = (value["ranges"]?.array ?? []).map { ($0.array ?? []).compactMap(\.integer) }
        styles = (value["styles"]?.array ?? []).map { ($0.array ?? []).compactMap(\.integer) }
        let texts = (0..<Int32(tokenizer.vocabularySize)).map { tokenizer.entry($0) ?? "" }
        bytes = texts.enumerated().filter {
            $0.element.utf8.count == 6 && $0.element.utf8.starts(with: "<0x".utf8)
        }.map { Int32($0.offset) }
        entries = texts.map { text in
            String(scalars: text.unicodeScalars.map { $0 == "\u{2581}" ? " " : $0 })
        }
        added = tokenizer.addedIDs.sorted()
    }

    static func file(_ name: String) -> URL {
        let folder = ProcessInfo.processInfo.environment["MEDPHI_RANDOM"]
        return (folder.map { URL(fileURLWithPath: $0) } ?? Vectors.recorded)
            .appendingPathComponent("random-\(name).json")
    }

    /// How many cases a group has, and which of them have another answer here.
    func differences(_ group: String) throws -> (count: Int, at: [Int]) {
        let digests = Array((value[group]?.string ?? "").utf8)
        let count = digests.count / Self.digits
        let wrong = try (0..<count).filter { at in
            let expected = digests[at * Self.digits..<(at + 1) * Self.digits]
            return try !expected.elementsEqual(digest(answer(group, at)).utf8)
        }
        return (count, wrong)
    }

    private func digest(_ numbers: [Int]) -> String {
        let text = numbers.map { String($0) }.joined(separator: ",")
        return String(SHA256.hex(Data(text.utf8)).prefix(Self.digits))
    }

    private func answer(_ group: String, _ at: Int) throws -> [Int] {
        let kind = ["plain": 0, "raw": 0, "chat": 2][group] ?? 1
        var random = CaseRandom(seed, UInt64(kind), at)
        switch group {
        case "plain": return tokenizer.encode(text(&random)).map { Int($0) }
        case "raw": return tokenizer.encodeUnsafeRaw(text(&random)).map { Int($0) }
        case "chat":
            let (messages, generation) = chat(&random)
            return try tokenizer.encodeChat(messages, generation: generation).map { Int($0) }
        case "whole":
            return tokenizer.decode(ids(&random), skipSpecial: false).utf8.map { Int($0) }
        case "skipped": return tokenizer.decode(ids(&random)).utf8.map { Int($0) }
        default:
            var stream = tokenizer.streamingDecoder()
            let known = ids(&random).filter { $0 < tokenizer.vocabularySize }
            let pieces = known.map { stream.step($0) } + [stream.flush()]
            return pieces.flatMap { $0.utf8.map { Int($0) } + [256] }
        }
    }

    private func piece(_ random: inout CaseRandom, _ style: [Int]) -> String {
        switch style[random.below(style.count)] {
        case Self.scalar:
            let range = ranges[random.below(ranges.count)]
            let number = range[0] + random.below(range[1] - range[0])
            return Unicode.Scalar(UInt32(number)).map { String($0) } ?? ""
        case Self.entry: return entries[random.below(entries.count)]
        case let kind: return pools[kind][random.below(pools[kind].count)]
        }
    }

    private func text(_ random: inout CaseRandom) -> String {
        let style = styles[random.below(styles.count)]
        if random.below(16) == 0 {
            let piece = piece(&random, style)
            return String(repeating: piece, count: random.below(200))
        }
        var view = String.UnicodeScalarView()
        for _ in 0..<random.below(24) {
            view.append(contentsOf: piece(&random, style).unicodeScalars)
        }
        return String(view)
    }

    private func ids(_ random: inout CaseRandom) -> [Int32] {
        let style = random.below(4)
        if style == 3 {
            let ids = tokenizer.encode(text(&random))
            return Array(ids[random.below(ids.count + 1)...])
        }
        return (0..<random.below(24)).map { _ in
            switch style < 2 ? style : 2 + random.below(4) {
            case 0, 2: Int32(random.below(entries.count))
            case 1, 3: bytes[random.below(256)]
            case 4: added[random.below(added.count)]
            default: Int32(entries.count + random.below(60))
            }
        }
    }

    private func chat(_ random: inout CaseRandom) -> ([ChatMessage], generation: Bool) {
        var messages: [ChatMessage] = []
        if random.below(2) == 0 {
            messages.append(ChatMessage(role: .system, content: text(&random)))
        }
        for at in 0..<random.below(5) {
            let role = at % 2 == 0 ? ChatRole.user : .assistant
            messages.append(ChatMessage(role: role, content: text(&random)))
        }
        return (messages, random.below(2) == 0)
    }
}

/// SplitMix64, begun anew for each case.
private struct CaseRandom {
    private var generator: SplitMix

    init(_ seed: UInt64, _ group: UInt64, _ at: Int) {
        generator = SplitMix(seed << 40 | group << 32 | UInt64(at))
    }

    mutating func below(_ count: Int) -> Int { Int(generator.next() % UInt64(count)) }
}
