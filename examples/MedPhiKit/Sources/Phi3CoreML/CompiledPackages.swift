#if canImport(CoreML)
    import CoreML
    import Foundation
    import Phi3Core

    /// Where the compiled form of a bundle's package is, and making it.
    ///
    /// Compiling takes long and gives another copy of the package, so the result is kept: for one
    /// manifest, whose hashes cover every file of the package, and one build of the system.
    actor CompiledPackages {
        /// A compiled package.
        struct Place: Sendable {
            /// The `.mlmodelc` folder.
            let url: URL
            /// Whether it was compiled just now.
            let isNew: Bool
            /// Whether it may be removed and made again.
            let isOurs: Bool
        }

        private let bundle: ModelBundle
        private let folder: URL
        private let system: String
        private var running: Task<Place, any Error>?
        private var hasForgotten = false

        /// The packages of one bundle.
        ///
        /// - Parameters:
        ///   - bundle: the bundle.
        ///   - folder: where compiled packages are kept.
        ///   - system: the system's version and build.
        init(_ bundle: ModelBundle, folder: URL, system: String) {
            self.bundle = bundle
            self.folder = folder
            self.system = system
        }

        /// The compiled package; it is compiled where it is not there yet.
        ///
        /// Two callers at once wait for one compilation.
        func place(_ report: @escaping @Sendable (LoadEvent) -> Void) async throws -> Place {
            if let running { return try await running.value }
            let task = Task { try await find(report) }
            running = task
            defer { running = nil }
            return try await task.value
        }

        /// Removes what was kept because it cannot be loaded. Only once: compiling takes long, and what
        /// was made anew is not damaged.
        ///
        /// - Returns: whether it was removed.
        func forget() throws -> Bool {
            if hasForgotten { return false }
            hasForgotten = true
            let names = try names()
            try? FileManager.default.removeItem(at: folder.appendingPathComponent(names.entry))
            return true
        }

        private func find(_ report: @Sendable (LoadEvent) -> Void) async throws -> Place {
            let package = bundle.package
            let sibling = package.deletingPathExtension().appendingPathExtension("mlmodelc")
            for ready in [package, sibling] where ready.pathExtension == "mlmodelc" {
                if FileBytes.kind(of: ready) == .folder {
                    return Place(url: ready, isNew: false, isOurs: false)
                }
            }
            let names = try names()
            let target = folder.appendingPathComponent(names.entry)
            if FileBytes.kind(of: target) == .folder {
                removeOthers(names)
                return Place(url: target, isNew: false, isOurs: true)
            }
            guard FileBytes.kind(of: package) == .folder else {
                throw Phi3Error.file(
                    ErrorDetails(
                        place: package.path, found: "no package there",
                        expected: "the Core ML package that the manifest names",
                        advice: "Fetch or export the bundle again."))
            }
            report(.compiling)
            let made: URL
            do {
                made = try await MLModel.compileModel(at: package)
            } catch let error as CancellationError {
                throw error
            } catch {
                throw Phi3Error.modelLoad(
                    ErrorDetails(
                        place: package.path,
                        found: "it cannot be compiled (\(LoadedPackage.reason(error)))",
                        expected: "a package for this system, and room for a second copy of it",
                        advice: "Free some space or update the system; else export it again."))
            }
            try keep(made, as: target)
            removeOthers(names)
            return Place(url: target, isNew: true, isOurs: true)
        }

        /// Moves a compiled package to its place, where it appears complete or not at all.
        private func keep(_ made: URL, as target: URL) throws {
            let files = FileManager.default
            let aside = folder.appendingPathComponent(
                ".\(UUID().uuidString.prefix(8)).\(CompiledPackages.unfinished)")
            do {
                try files.createDirectory(at: folder, withIntermediateDirectories: true)
                try CompiledPackages.leaveOutOfBackups(folder)
                try files.moveItem(at: made, to: aside)
            } catch {
                try? files.removeItem(at: made)
                try? files.removeItem(at: aside)
                throw CompiledPackages.notKept(folder, error)
            }
            do {
                try files.moveItem(at: aside, to: target)
            } catch {
                try? files.removeItem(at: aside)
                // Another process may have been faster.
                if FileBytes.kind(of: target) == .folder { return }
                throw CompiledPackages.notKept(folder, error)
            }
        }

        /// Removes packages of other systems, older ones of this model, and what was left unfinished.
        private func removeOthers(_ names: Names) {
            let files = FileManager.default
            for name in (try? files.contentsOfDirectory(atPath: folder.path)) ?? [] {
                let isOurKind = name.hasSuffix(".mlmodelc") && name.hasPrefix("medphi-")
                let isOld =
                    isOurKind && name != names.entry
                    && (name.hasPrefix(names.model) || !name.hasSuffix(names.system))
                if isOld || (name.hasPrefix(".") && name.hasSuffix(CompiledPackages.unfinished)) {
                    try? files.removeItem(at: folder.appendingPathComponent(name))
                }
            }
        }

        private struct Names {
            let model: String
            let system: String
            let entry: String
        }

        private func names() throws -> Names {
            let place = bundle.place(Manifest.fileName)
            let hash = SHA256.hex(try FileBytes.read(place, limit: FileBytes.jsonLimit)).prefix(24)
            let model = "medphi-\(SHA256.hex(Data(bundle.manifest.name.utf8)).prefix(12))-"
            let system = "-\(SHA256.hex(Data(self.system.utf8)).prefix(8)).mlmodelc"
            return Names(model: model, system: system, entry: "\(model)\(hash)\(system)")
        }

        private static let unfinished = "medphi-unfinished"

        private static func notKept(_ folder: URL, _ error: any Error) -> Phi3Error {
            .file(
                ErrorDetails(
                    place: folder.path,
                    found: "the compiled package cannot be kept (\(LoadedPackage.reason(error)))",
                    expected: "a folder with room for it",
                    advice: "Free some space, or choose another folder for compiled packages."))
        }

        /// A compiled package can be made again at any time.
        private static func leaveOutOfBackups(_ folder: URL) throws {
            #if canImport(Darwin)
                var folder = folder
                var values = URLResourceValues()
                values.isExcludedFromBackup = true
                try folder.setResourceValues(values)
            #endif
        }
    }
#endif
