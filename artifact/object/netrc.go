package object

import (
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"

	"kedge/deployments/inputfile"
)

// netrcHeader returns the Authorization header for a URL's host, as curl --netrc sends it; nil: there is none. The user
// and password are NETRC's, or those of ~/.netrc. A redirect to another host doesn't carry the header.
func netrcHeader(u *url.URL) (http.Header, error) {
	if !isConfidential(u) {
		return nil, nil
	}
	file := os.Getenv("NETRC")
	if file == "" {
		home, err := os.UserHomeDir()
		if err != nil {
			return nil, nil // a service may have no home
		}
		file = filepath.Join(home, ".netrc")
	}
	data, err := inputfile.Read("NETRC", file)
	if errors.Is(err, fs.ErrNotExist) && os.Getenv("NETRC") == "" {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("reading the password of %s: %w", u.Hostname(), err)
	}
	user, password, found := findMachine(string(data), u.Hostname())
	if !found {
		return nil, nil
	}
	r := http.Request{Header: http.Header{}}
	r.SetBasicAuth(user, password)
	return r.Header, nil
}

// findMachine finds a host's entry in a netrc, or the default one.
func findMachine(text, host string) (user, password string, found bool) {
	var words []string
	macro := false
	for line := range strings.Lines(text) {
		if macro = macro && strings.TrimSpace(line) != ""; macro {
			continue // an empty line ends a macro
		}
		for _, word := range strings.Fields(line) {
			if strings.HasPrefix(word, "#") && word != "#" && len(words) > 0 && words[len(words)-1] == "password" {
				words = append(words, word) // a password may begin with #
				continue
			}
			if strings.HasPrefix(word, "#") {
				break
			}
			if word == "macdef" {
				macro = true
				break
			}
			words = append(words, word)
		}
	}
	ours := false
	for i := 0; i < len(words); i++ {
		value := ""
		if i+1 < len(words) {
			value = words[i+1]
		}
		switch words[i] {
		case "machine":
			if ours {
				return user, password, true
			}
			ours, i = strings.EqualFold(value, host), i+1
		case "default":
			if ours {
				return user, password, true
			}
			ours = true
		case "login":
			if i++; ours {
				user = value
			}
		case "password":
			if i++; ours {
				password = value
			}
		case "account":
			i++
		}
	}
	return user, password, ours
}
