// Package artifact publishes, fetches and keeps releases: trees of files. In object storage a release is one archive,
// and on a node it is one directory. Package archive defines the formats of archive, index and delta, and the frames
// of an archive: the pieces that can be fetched and decoded alone.
//
// # Fetching
//
// An archive with an index is fetched in parts. With strategy release, a node first takes what it
// can from the release that it runs. Each file that it takes is hashed first, unless it is known to be
// unchanged. The rest comes from a delta, if one was published for that release. What the delta
// lacks comes from the archive, in spans of up to 8 MiB, which bridge gaps of up to 128 KiB, on
// eight connections. Frames are hashed before they are decoded. Files are written by as many
// workers as there are cores, straight into a private directory. Every 64 MiB the file system is
// synced in the background: the sync before the switch, which alone counts, then has little left to
// do.
//
// A fetch keeps no journal. With strategy release, a fetch hashes what an interrupted fetch left on
// the disk, and keeps what is right: whole files, and of large files also single frames. With the
// other strategies, it starts again. A delta of more than 4 MiB is fetched after the index, if the
// disk has room for the delta and the tree. If fetching the delta is interrupted, the next fetch
// resumes it. The delta is read only after its hash was verified.
//
// An archive without an index is unpacked as it comes, and nothing is kept of the stream. If the
// process was killed, or the storage went away, the next try fetches an archive of 16 MiB or more
// to a file beside the tree. Each further try goes on where that file ends. For this, the object
// must have the same ETag as before, its server must keep to Range, and the disk must have room for
// archive and tree. If one of these conditions fails, the archive is streamed again. The file is
// unpacked after all of it was fetched and has the manifest's checksum. It is removed when the
// release is whole or refused, or when another archive is fetched like this.
//
// If the node's configuration names mirrors, each object is asked for there first; a mirror that
// failed within the last minute is asked last. What comes is used only if its hash is right, so any
// place may give it. An archive without an index whose checksum is shorter than SHA-256 is read
// only from its own URL.
//
// A file made of frames is not hashed a second time: the index has the hash of each frame, and a
// frame always decodes to the same bytes. The index also has the file's own hash. Whoever packed
// the archive must have taken both hashes from the same bytes, as publish does. If the two disagree
// in an index, verifying the release reports the file.
//
// Memory: some 60 MiB whatever the archive's size, and 0.3 KiB for each entry of the tree. The most that was measured,
// with GOGC=50 as in the agent: 68 MB for 44,567 files of 563 MB, 111 MB for 178,268 files of 2,252 MB.
package artifact
