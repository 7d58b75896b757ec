// Package safefs works on files below a directory that others may change meanwhile. It leads nobody out of there:
//
//   - Place is a directory that is held open. It was reached through no link, and through no directory, that somebody
//     other than a trusted user could have put there.
//   - Dirs opens, makes and removes the files of one tree, and follows no symbolic link on the way.
//   - RemoveTree removes a tree, follows no symbolic link, and crosses no mount point.
//
// It knows neither releases nor archives. What must outlast a power cut is written by package durable.
package safefs
