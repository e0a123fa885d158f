import Foundation

@testable import Phi3Core

/// Files for tests of files.
enum FileFixtures {
    /// The folder of the whole project, five levels above this file.
    static let root = (0..<5).reduce(URL(fileURLWithPath: #filePath)) { url, _ in
        url.deletingLastPathComponent()
    }
    /// Small checkpoints that transformers made.
    static let phi3 = root.appendingPathComponent("tests/fixtures/phi3")
    /// One of them, with adapters of PEFT inside.
    static let mini = phi3.appendingPathComponent("mini-4k")
    /// How many inputs a fuzz test tries; the variable multiplies it for a long run.
    static func fuzzCount(_ usual: Int) -> Int {
        usual * (ProcessInfo.processInfo.environment["MEDPHI_FUZZ"].flatMap { Int($0) } ?? 1)
    }
}

/// A folder for one test, removed when the test ends.
final class TestFolder: Sendable {
    let url: URL

    init() throws {
        url = FileManager.default.temporaryDirectory.appendingPathComponent(
            "medphi-\(UUID().uuidString)")
        try FileManager.default.createDirectory(at: url, withIntermediateDirectories: true)
    }

    deinit { try? FileManager.default.removeItem(at: url) }

    subscript(name: String) -> URL { url.appendingPathComponent(name) }

    /// Writes a file and the folders that lead to it.
    @discardableResult func write(_ data: Data, _ name: String) throws -> URL {
        let place = self[name]
        try FileManager.default.createDirectory(
            at: place.deletingLastPathComponent(), withIntermediateDirectories: true)
        try data.write(to: place)
        return place
    }

    @discardableResult func write(_ text: String, _ name: String) throws -> URL {
        try write(Data(text.utf8), name)
    }
}

/// Numbers that follow from a seed (SplitMix64).
struct SplitMix: RandomNumberGenerator {
    var state: UInt64

    init(_ seed: UInt64) { state = seed }

    mutating func next() -> UInt64 {
        state &+= 0x9E37_79B9_7F4A_7C15
        var z = state
        z = (z ^ (z >> 30)) &* 0xBF58_476D_1CE4_E5B9
        z = (z ^ (z >> 27)) &* 0x94D0_49BB_1331_11EB
        return z ^ (z >> 31)
    }
}

/// Spoils bytes and values the way broken disks and hostile people do.
enum Spoiler {
    private static let words = [
        "-1", "0", "1e999", "9223372036854775807", "9223372036854775808", "-9223372036854775808",
        "1e308", "null", "true", "[]", "{}", "\"\"", "\"../../x\"", "\"\\u0000\"", "0.5", "1e-320",
        "[[[[[[", "\"\\ud800\"", "4294967296", "2147483648", "\u{FEFF}",
    ]

    /// Some bytes of it changed, cut, doubled, or replaced by a word.
    static func bytes(_ data: Data, _ generator: inout SplitMix) -> Data {
        var bytes = [UInt8](data)
        for _ in 0..<Int.random(in: 1...4, using: &generator) where !bytes.isEmpty {
            let at = Int.random(in: 0..<bytes.count, using: &generator)
            switch Int.random(in: 0..<7, using: &generator) {
            case 0: bytes[at] = UInt8.random(in: 0...255, using: &generator)
            case 1: bytes[at] ^= 1 << UInt8.random(in: 0..<8, using: &generator)
            case 2:
                bytes.removeSubrange(
                    at..<min(at + Int.random(in: 1...40, using: &generator), bytes.count))
            case 3: bytes.removeSubrange(at...)
            case 4:
                let end = min(at + Int.random(in: 1...60, using: &generator), bytes.count)
                bytes.insert(contentsOf: bytes[at..<end], at: at)
            default:
                let word = Array((words.randomElement(using: &generator) ?? "").utf8)
                bytes.replaceSubrange(at..<min(at + word.count, bytes.count), with: word)
            }
        }
        return Data(bytes)
    }

    /// One value somewhere inside replaced, dropped, or given another name.
    static func value(_ value: JSONValue, _ generator: inout SplitMix) -> JSONValue {
        switch value {
        case .object(let members)
        where !members.isEmpty && Int.random(in: 0..<8, using: &generator) > 0:
            var changed = members
            let name = members.names.randomElement(using: &generator) ?? ""
            switch Int.random(in: 0..<12, using: &generator) {
            case 0: changed[name] = nil
            case 1: changed["\(name)x"] = members[name]
            default: changed[name] = members[name].map { Spoiler.value($0, &generator) }
            }
            return .object(changed)
        case .array(var items) where !items.isEmpty && Int.random(in: 0..<6, using: &generator) > 0:
            let at = Int.random(in: 0..<items.count, using: &generator)
            switch Int.random(in: 0..<6, using: &generator) {
            case 0: items.remove(at: at)
            case 1: items.append(items[at])
            default: items[at] = Spoiler.value(items[at], &generator)
            }
            return .array(items)
        default: return strange(&generator)
        }
    }

    private static func strange(_ generator: inout SplitMix) -> JSONValue {
        let values: [JSONValue] = [
            .null, .bool(true), .bool(false), .integer(0), .integer(-1), .integer(1),
            .integer(.max),
            .integer(.min), .integer(1 << 31), .integer(1 << 53), .number(1e308),
            .number(.leastNonzeroMagnitude),
            .number(0.5), .string(""), .string("../x"), .string("/"), .string("a\u{0}b"),
            .string("x".padding(toLength: 300, withPad: "y", startingAt: 0)), .array([]),
            .array([.integer(1), .null]), .object(JSONObject()), ["a": ["b": .null]], "predict",
        ]
        return values.randomElement(using: &generator) ?? .null
    }
}

/// Whether an error is one of this package's, whose text says what to do.
func isReadable(_ error: any Error) -> Bool {
    guard let error = error as? Phi3Error else { return false }
    return !error.details.advice.isEmpty && !error.description.isEmpty
}

/// The problems that an error lists; empty for errors without a list.
func listedProblems(_ body: () throws -> Void) -> [String] {
    do {
        try body()
    } catch let Phi3Error.adapterIncompatible(list) {
        return list.problems
    } catch let Phi3Error.manifest(list) {
        return list.problems
    } catch let Phi3Error.checksumMismatch(list) {
        return list.problems
    } catch {}
    return []
}

/// Whether one of the lines begins with a text.
func names(_ lines: [String], _ text: String) -> Bool { lines.contains { $0.hasPrefix(text) } }
