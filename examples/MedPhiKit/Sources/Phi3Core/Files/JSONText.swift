import Foundation

extension JSONValue {
    /// How a value is written as text.
    public struct Style: Sendable {
        /// Whether members are sorted by the bytes of their names.
        public var sortsKeys: Bool
        /// Whether scalars beyond ASCII are written as escapes.
        public var escapesNonASCII: Bool
        /// Spaces per level; `nil` writes everything on one line.
        public var indent: Int?
        /// Between items on one line.
        public var itemSeparator: String
        /// Between a name and its value.
        public var nameSeparator: String

        /// As Python's `json.dumps` writes by default.
        public static let line = Style(
            sortsKeys: false, escapesNonASCII: true, indent: nil, itemSeparator: ", ",
            nameSeparator: ": ")
        /// Without spaces, members sorted: what hashes are made of.
        public static let canonical = Style(
            sortsKeys: true, escapesNonASCII: true, indent: nil, itemSeparator: ",",
            nameSeparator: ":")
        /// Without spaces, UTF-8 as it is, members in their order.
        public static let compact = Style(
            sortsKeys: false, escapesNonASCII: false, indent: nil, itemSeparator: ",",
            nameSeparator: ":")
        /// Two spaces per level, UTF-8 as it is.
        public static let pretty = Style(
            sortsKeys: false, escapesNonASCII: false, indent: 2, itemSeparator: ",",
            nameSeparator: ": ")
    }

    /// The value as JSON text.
    public func text(_ style: Style = .line) -> String {
        var out = ""
        write(into: &out, style, level: 0)
        return out
    }

    private func write(into out: inout String, _ style: Style, level: Int) {
        switch self {
        case .null: out += "null"
        case .bool(let value): out += value ? "true" : "false"
        case .integer(let value): out += String(value)
        case .number(let value): out += value.isFinite ? "\(value)" : "null"
        case .string(let value): JSONValue.quote(value, into: &out, style)
        case .array(let items):
            JSONValue.list("[", "]", items, into: &out, style, level) { item, out in
                item.write(into: &out, style, level: level + 1)
            }
        case .object(let object):
            let members =
                style.sortsKeys
                ? object.members.sorted { $0.name.utf8.lexicographicallyPrecedes($1.name.utf8) }
                : object.members
            JSONValue.list("{", "}", members, into: &out, style, level) { member, out in
                JSONValue.quote(member.name, into: &out, style)
                out += style.nameSeparator
                member.value.write(into: &out, style, level: level + 1)
            }
        }
    }

    private static func list<Item>(
        _ open: String, _ close: String, _ items: [Item], into out: inout String, _ style: Style,
        _ level: Int, _ one: (Item, inout String) -> Void
    ) {
        func line(_ level: Int) -> String {
            style.indent.map { "\n" + String(repeating: " ", count: $0 * level) } ?? ""
        }
        out += open
        for (i, item) in items.enumerated() {
            if i > 0 { out += style.itemSeparator }
            out += line(level + 1)
            one(item, &out)
        }
        if !items.isEmpty { out += line(level) }
        out += close
    }

    private static func quote(_ text: String, into out: inout String, _ style: Style) {
        out += "\""
        for scalar in text.unicodeScalars {
            switch scalar {
            case "\"": out += "\\\""
            case "\\": out += "\\\\"
            case "\n": out += "\\n"
            case "\r": out += "\\r"
            case "\t": out += "\\t"
            case "\u{08}": out += "\\b"
            case "\u{0C}": out += "\\f"
            default:
                if scalar.value < 0x20 || (style.escapesNonASCII && scalar.value > 0x7E) {
                    for unit in String(scalar).utf16 {
                        let digits = String(unit, radix: 16)
                        out += "\\u" + String(repeating: "0", count: 4 - digits.count) + digits
                    }
                } else {
                    out.unicodeScalars.append(scalar)
                }
            }
        }
        out += "\""
    }
}
