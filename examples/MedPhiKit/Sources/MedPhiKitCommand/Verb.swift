/// One verb: what can be typed behind it, and what it does.
struct Verb: Sendable {
    /// Something with two dashes before it.
    struct Option: Sendable {
        /// Without the dashes.
        let name: String
        /// What its value is called; `nil`: it has none.
        let value: String?
        let help: String

        init(_ name: String, _ value: String? = nil, _ help: String) {
            (self.name, self.value, self.help) = (name, value, help)
        }

        var shown: String { "--\(name)" + (value.map { " \($0)" } ?? "") }
    }

    /// Something with a place of its own.
    struct Place: Sendable {
        let name: String
        let help: String
        var isOptional = false

        var shown: String { isOptional ? "[\(name)]" : name }
    }

    let name: String
    let summary: String
    let places: [Place]
    let options: [Option]
    let examples: [String]
    let run: @Sendable (Arguments, Console) async throws -> Int32

    static let json = Option("json", nil, "Print one JSON value instead of text.")
    static let model = Place(
        name: "MODEL", help: "A bundle NAME.medphi, a checkpoint's folder, or one .safetensors.")
    static let backend = Option(
        "backend", "reference|coreml",
        "What computes: the processor or Core ML [default: Core ML where it is, for bundles].")

    /// What `--help` prints.
    var help: String {
        var rows = places.map { ($0.name, $0.help) }
        rows += options.map { ($0.shown, $0.help) }
        let width = min(rows.map(\.0.count).max() ?? 0, 28)
        let lines = rows.map { left, right in
            let pad = left.padding(toLength: max(width, left.count), withPad: " ", startingAt: 0)
            return "  \(pad)  \(right)"
        }
        let usage =
            (["medphi-kit", name] + places.map(\.shown) + (options.isEmpty ? [] : ["[options]"]))
            .joined(separator: " ")
        return """
            \(usage)

            \(summary)

            \(lines.joined(separator: "\n"))

            Examples:
            \(examples.map { "  \($0)" }.joined(separator: "\n"))
            """
    }
}

/// The name that was probably meant.
enum Nearest {
    static func of(_ text: String, among names: [String]) -> String? {
        let typed = Array(text.lowercased())
        let near = names.map { (name: $0, distance: distance(typed, Array($0))) }
            .min { ($0.distance, $0.name) < ($1.distance, $1.name) }
        guard let near, near.distance <= max(1, near.name.count / 3) else { return nil }
        return near.name
    }

    /// Single letters to change, add, drop, or swap with their neighbour.
    private static func distance(_ a: [Character], _ b: [Character]) -> Int {
        guard a.count <= 64 else { return .max }
        var rows = [Array(0...b.count)]
        for i in 0..<a.count {
            var row = [i + 1]
            for j in 0..<b.count {
                var best = min(rows[i][j + 1] + 1, row[j] + 1, rows[i][j] + (a[i] == b[j] ? 0 : 1))
                if i > 0, j > 0, a[i] == b[j - 1], a[i - 1] == b[j] {
                    best = min(best, rows[i - 1][j - 1] + 1)
                }
                row.append(best)
            }
            rows.append(row)
        }
        return rows[a.count][b.count]
    }
}
