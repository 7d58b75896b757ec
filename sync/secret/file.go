package secret

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"syscall"
)

// readFile reads a file at or below a path that the node's configuration allows. It follows relative links within that
// path or, if the path is the file's own, within its directory. So whoever can write there can't have other files read.
func readFile(name, allowed string) (string, error) {
	dir := filepath.Clean(allowed)
	if dir == name {
		dir = filepath.Dir(name)
	}
	return readBelow(dir, name)
}

func readCredential(name string) (string, error) {
	dir := os.Getenv("CREDENTIALS_DIRECTORY")
	if dir == "" {
		return "", errors.New("systemd passes no credentials to this process: its service needs LoadCredential= or the like")
	}
	return readBelow(dir, filepath.Join(dir, name))
}

func readBelow(dir, name string) (string, error) {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return "", err
	}
	defer root.Close()
	rel, err := filepath.Rel(dir, name)
	if err != nil {
		return "", err
	}
	f, err := root.OpenFile(rel, os.O_RDONLY|syscall.O_NONBLOCK, 0) // opening a FIFO would block for ever
	if err != nil {
		return "", err
	}
	defer f.Close()
	switch info, err := f.Stat(); {
	case err != nil:
		return "", err
	case !info.Mode().IsRegular():
		return "", errors.New("it is not a regular file")
	}
	data, err := io.ReadAll(io.LimitReader(f, maxValue+int64(len("\r\n"))+1))
	if err != nil {
		return "", err
	}
	text, ended := strings.CutSuffix(string(data), "\r\n")
	if !ended {
		text = strings.TrimSuffix(text, "\n")
	}
	if len(text) > maxValue {
		return "", fmt.Errorf("it has more than %d bytes", maxValue)
	}
	return text, nil
}
