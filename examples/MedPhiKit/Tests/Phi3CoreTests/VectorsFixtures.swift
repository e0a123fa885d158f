import Foundation
import Phi3Core

/// Files of the checkout that the tests read.
enum Vectors {
    static let root = URL(fileURLWithPath: #filePath).deletingLastPathComponent()
        .appendingPathComponent("../../../..").standardizedFileURL
    static let tiny = root.appendingPathComponent("mlx_medphi/assets/tiny")
    static let mini = root.appendingPathComponent("tests/fixtures/phi3/mini-4k")
    static let phi3 = shared.appendingPathComponent("tokenizer/phi-3-mini")

    /// What the Python package recorded; see tests/fixtures/make_swift_vectors.py.
    static let recorded =
        environment("MEDPHI_SWIFT_VECTORS")
        ?? root.appendingPathComponent("tests/fixtures/swift")

    static let hasRecorded = exists(recorded) && exists(tiny)
    // The tokenizer is not ours, and never part of a checkout.
    static let hasPhi3 = exists(phi3)
    // Made beside a checkout by the same script.
    static let hasPhi3Vectors =
        hasPhi3 && exists(recorded.appendingPathComponent("vectors-phi-3-mini.json"))

    private static let shared =
        environment("MEDPHI_SHARED")
        ?? root.deletingLastPathComponent().appendingPathComponent("shared")

    /// The checkpoint that a name of a recorded file stands for.
    static func checkpoint(_ name: String) -> URL {
        ["tiny": tiny, "mini-4k": mini][name] ?? phi3
    }

    static func data(_ name: String) throws -> Data {
        try Data(contentsOf: recorded.appendingPathComponent(name))
    }

    static func cases(_ name: String) throws -> [JSONValue] {
        try JSONValue(parsing: data("\(name).json")).array ?? []
    }

    private static func environment(_ name: String) -> URL? {
        ProcessInfo.processInfo.environment[name].map { URL(fileURLWithPath: $0) }
    }

    private static func exists(_ url: URL) -> Bool {
        FileManager.default.fileExists(atPath: url.path)
    }
}

/// Seconds that this thread computed for some work. What else the machine does counts little.
func processorSeconds(_ work: () -> Void) -> Double {
    func now() -> Double {
        var time = timespec()
        clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time)
        return Double(time.tv_sec) + Double(time.tv_nsec) * 1e-9
    }
    let begin = now()
    work()
    return now() - begin
}

/// Whether two texts are the same scalars; `==` takes texts that look alike for equal.
func same(_ left: String, _ right: String) -> Bool { left.utf8.elementsEqual(right.utf8) }

extension SplitMix {
    /// Any scalar; most of them are of those that texts are made of.
    mutating func scalar() -> Unicode.Scalar {
        let value: UInt32 =
            switch Int.random(in: 0..<10, using: &self) {
            case 0..<5: .random(in: 0x20..<0x7F, using: &self)
            case 5:
                [0x09, 0x0A, 0x0D, 0x85, 0xA0, 0x2003, 0x3000, 0x2581, 0xFEFF].randomElement(
                    using: &self) ?? 0x20
            case 6: .random(in: 0x80..<0x800, using: &self)
            case 7: .random(in: 0x1F300..<0x1FB00, using: &self)
            case 8: .random(in: 0x800..<0x10000, using: &self)
            default: .random(in: 0..<0x110000, using: &self)
            }
        return Unicode.Scalar(value) ?? "\u{FFFD}"
    }

    mutating func text(upTo length: Int) -> String {
        var view = String.UnicodeScalarView()
        for _ in 0..<Int.random(in: 0...length, using: &self) { view.append(scalar()) }
        return String(view)
    }
}
