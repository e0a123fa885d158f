#if canImport(CoreML)
    import CoreML
    import Foundation
    import Phi3Core
    import Synchronization

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

        // What this process has loaded may be mapped into its memory for as long as it runs.
        private static let inUse = Mutex<Set<String>>([])
        private static let day: TimeInterval = 86_400
        // Bundles of one name may be used in turn, each with a package of its own.
        private static let keptFor = 30 * day

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
        /// Two callers at once wait for one compilation. A caller that is cancelled waits no longer; the
        /// compilation, which nothing can stop, goes on for the next one.
        ///
        /// - Throws: `Phi3Error`, or `CancellationError` as soon as the caller's task is cancelled.
        func place(_ report: @escaping @Sendable (LoadEvent) -> Void) async throws -> Place {
            let task = running ?? begin(report)
            let (results, result) = AsyncThrowingStream<Place, any Error>.makeStream()
            Task {
                do {
                    result.yield(try await task.value)
                    result.finish()
                } catch {
                    result.finish(throwing: error)
                }
            }
            for try await place in results { return place }
            // The stream of a task that is cancelled ends at once.
            throw CancellationError()
        }

        private func begin(
            _ report: @escaping @Sendable (LoadEvent) -> Void
        ) -> Task<Place, any Error> {
            let task = Task {
                defer { running = nil }
                return try await find(report)
            }
            running = task
            return task
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
                use(target)
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
            } catch {
                throw Phi3Error.modelLoad(
                    ErrorDetails(
                        place: package.path,
                        found: "it cannot be compiled (\(LoadedPackage.reason(error)))",
                        expected: "a package for this system, and room for a second copy of it",
                        advice: "Free some space or update the system; else export it again."))
            }
            try keep(made, as: target)
            use(target)
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

        /// Notes that a package is used, in this process and, by its date, for all others.
        private func use(_ target: URL) {
            let path = FileBytes.realPath(of: target)
            CompiledPackages.inUse.withLock { _ = $0.insert(path) }
            try? FileManager.default.setAttributes(
                [.modificationDate: Date()], ofItemAtPath: target.path)
        }

        /// Removes packages of other systems, those of this model's name that nobody used for long, and
        /// what was left unfinished: a younger one may be another process's, which is at it.
        private func removeOthers(_ names: Names) {
            let files = FileManager.default
            for name in (try? files.contentsOfDirectory(atPath: folder.path)) ?? [] {
                let place = folder.appendingPathComponent(name)
                let age = CompiledPackages.age(of: place)
                let isOld: Bool
                if name.hasPrefix("."), name.hasSuffix(CompiledPackages.unfinished) {
                    isOld = age > CompiledPackages.day
                } else if name.hasPrefix("medphi-"), name.hasSuffix(".mlmodelc") {
                    // Nothing can load a package of another system any more.
                    let isLeft = name.hasPrefix(names.model) && age > CompiledPackages.keptFor
                    isOld = (isLeft || !name.hasSuffix(names.system)) && !isInUse(place)
                } else {
                    isOld = false
                }
                if isOld { try? files.removeItem(at: place) }
            }
        }

        private func isInUse(_ place: URL) -> Bool {
            let path = FileBytes.realPath(of: place)
            return CompiledPackages.inUse.withLock { $0.contains(path) }
        }

        /// Seconds since something was made or used; 0 where nobody knows.
        private static func age(of place: URL) -> TimeInterval {
            let facts = try? FileManager.default.attributesOfItem(atPath: place.path)
            return (facts?[.modificationDate] as? Date).map { -$0.timeIntervalSinceNow } ?? 0
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
