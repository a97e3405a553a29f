package report

import (
	"cmp"
	"regexp"
	"slices"
	"strings"
)

// maxFields is how many fields of a predicate are kept.
const maxFields = 256

// buildKind is a family of build types: those whose parameters we know how to read.
type buildKind int

const (
	unknownBuild buildKind = iota
	githubBuild            // a workflow run of GitHub Actions
	buildkitBuild
	gitlabBuild
	tektonBuild // Tekton Chains
)

// buildTypes says which build types are known, by their URI; one ending in / is a beginning.
var buildTypes = []struct {
	uri  string
	kind buildKind
}{
	{"https://actions.github.io/buildtypes/workflow/v1", githubBuild},
	{"https://slsa-framework.github.io/github-actions-buildtypes/workflow/v1", githubBuild},
	{"https://github.com/slsa-framework/slsa-github-generator/", githubBuild},
	{"https://github.com/Attestations/GitHubActionsWorkflow@v1", githubBuild},
	{"https://github.com/npm/cli/gha/v2", githubBuild},
	{"https://mobyproject.org/buildkit@v1", buildkitBuild},
	{"https://github.com/moby/buildkit/blob/master/docs/attestations/slsa-definitions.md", buildkitBuild},
	{"https://gitlab.com/gitlab-org/gitlab-runner/-/blob/", gitlabBuild},
	{"https://docs.gitlab.com/ci/pipeline_security/slsa/provenance_v1", gitlabBuild},
	{"https://tekton.dev/chains/v2/slsa", tektonBuild},
	{"https://tekton.dev/chains/v2/slsa-tekton", tektonBuild},
	{"https://tekton.dev/predicate/chains/slsa/v2", tektonBuild},
	{"tekton.dev/v1beta1/TaskRun", tektonBuild},
	{"tekton.dev/v1beta1/PipelineRun", tektonBuild},
	{"tekton.dev/v1/TaskRun", tektonBuild},
	{"tekton.dev/v1/PipelineRun", tektonBuild},
}

func kindOfBuild(uri string) buildKind {
	for _, t := range buildTypes {
		if isOrBegins(uri, t.uri) {
			return t.kind
		}
	}
	return unknownBuild
}

// dependency is a resolved dependency or a material.
type dependency struct {
	name, uri, commit string
	git               bool
}

// slsa is a predicate while it is read. Values are collected first and taken when the build type is
// known, which may stand after them.
type slsa struct {
	p      *Provenance
	fields map[string]string
	deps   []dependency
	// What may be the source, by where it was said.
	config     dependency // v0.2 invocation.configSource
	entrypoint string     // of it
}

// secretive are keys whose values may be secrets, or are anybody's text in great amounts.
var secretive = []string{"variables", "vars", "args", "secrets", "environment", "env", "buildConfig", "llbDefinition", "runSpec", "content"}

// flatten keeps the single values of the object or array at the cursor under their paths.
func (s *slsa) flatten(c *cursor, path string) {
	switch c.kind() {
	case '{':
		c.object(func(key []byte) {
			// A key with a dot could pass for the path of another value.
			if k := clean(string(key), maxWord); !slices.Contains(secretive, k) && !strings.Contains(k, ".") {
				s.flatten(c, path+"."+k)
			}
		})
	case '[':
		c.skip() // lists have no path that stays the same
	default:
		if v, ok := c.scalar(maxText); ok && len(s.fields) < maxFields {
			s.fields[clean(path, maxText)] = withoutCredentials(v)
		}
	}
}

// readSLSA1 reads https://slsa.dev/provenance/v1.
func readSLSA1(predicate []byte, d *Document) error {
	s := &slsa{p: &Provenance{}, fields: map[string]string{}}
	invocations := 0
	c := at(predicate)
	c.object(func(key []byte) {
		switch string(key) {
		case "buildDefinition":
			c.object(func(key []byte) {
				switch string(key) {
				case "buildType":
					s.p.BuildType = c.text(maxText)
				case "externalParameters", "internalParameters":
					s.flatten(c, "buildDefinition."+string(key))
				case "resolvedDependencies":
					c.array(func() { s.dependency(c) })
				}
			})
		case "runDetails":
			c.object(func(key []byte) {
				switch string(key) {
				case "builder":
					s.builder(c)
				case "metadata":
					c.object(func(key []byte) {
						switch string(key) {
						case "invocationId", "invocationID": // the text says one, BuildKit writes the other
							s.p.InvocationID = c.text(maxText)
							if invocations++; invocations > 1 {
								c.fail("invocationId and invocationID")
							}
						case "startedOn":
							s.p.StartedOn = c.time()
						case "finishedOn":
							s.p.FinishedOn = c.time()
						}
					})
				}
			})
		}
	})
	s.required(c)
	if c.err != nil {
		return c.err
	}
	const ext = "buildDefinition.externalParameters."
	f := s.fields
	switch kindOfBuild(s.p.BuildType) {
	case githubBuild:
		s.source(f[ext+"workflow.repository"])
		s.p.Ref, s.p.Entrypoint = f[ext+"workflow.ref"], f[ext+"workflow.path"]
	case buildkitBuild:
		s.source(f[ext+"configSource.uri"])
		s.p.Entrypoint = f[ext+"configSource.path"]
		s.commit(f[ext+"configSource.digest.sha1"])
	case gitlabBuild:
		s.source(f[ext+"source"])
		s.p.Entrypoint = f[ext+"entryPoint"]
	case tektonBuild:
		// buildConfigSource is where the pipeline comes from, not what it builds.
		s.p.Entrypoint = f[ext+"buildConfigSource.path"]
		s.onlyGit("inputs/result", "input/result")
	default:
		s.fields = nil
		s.onlyGit()
	}
	s.finish(d)
	return nil
}

// readSLSA02 reads https://slsa.dev/provenance/v0.2.
func readSLSA02(predicate []byte, d *Document) error {
	s := &slsa{p: &Provenance{}, fields: map[string]string{}}
	invocations := 0
	c := at(predicate)
	c.object(func(key []byte) {
		switch string(key) {
		case "buildType":
			s.p.BuildType = c.text(maxText)
		case "builder":
			s.builder(c)
		case "invocation":
			s.invocation(c)
		case "materials":
			c.array(func() { s.dependency(c) })
		case "metadata":
			c.object(func(key []byte) {
				switch string(key) {
				case "buildInvocationId", "buildInvocationID":
					s.p.InvocationID = c.text(maxText)
					if invocations++; invocations > 1 {
						c.fail("buildInvocationId and buildInvocationID")
					}
				case "buildStartedOn":
					s.p.StartedOn = c.time()
				case "buildFinishedOn":
					s.p.FinishedOn = c.time()
				}
			})
		}
	})
	s.required(c)
	if c.err != nil {
		return c.err
	}
	switch kindOfBuild(s.p.BuildType) {
	case githubBuild, buildkitBuild, gitlabBuild:
		s.source(s.config.uri)
		s.commit(s.config.commit)
		s.p.Entrypoint = s.entrypoint
	case tektonBuild:
		s.p.Entrypoint = s.entrypoint
		s.onlyGit()
	default:
		s.fields = nil
		s.onlyGit()
	}
	s.finish(d)
	return nil
}

// invocation reads v0.2's. Of the environment only what GitHub sets is kept: the rest is anybody's.
func (s *slsa) invocation(c *cursor) {
	c.object(func(key []byte) {
		switch string(key) {
		case "configSource":
			c.object(func(key []byte) {
				switch string(key) {
				case "uri":
					s.config.uri = c.text(maxText)
				case "digest":
					s.config.commit, _ = commitOf(c)
				case "entryPoint":
					s.entrypoint = c.text(maxText)
				}
			})
		case "parameters":
			s.flatten(c, "invocation.parameters")
		case "environment":
			c.object(func(key []byte) {
				k := strings.ToUpper(string(key))
				if !strings.HasPrefix(k, "GITHUB_") || strings.Contains(k, "TOKEN") || strings.Contains(k, "SECRET") {
					return
				}
				if v, ok := c.scalar(maxText); ok && len(s.fields) < maxFields {
					s.fields[clean("invocation.environment."+string(key), maxText)] = withoutCredentials(v)
				}
			})
		}
	})
}

func (s *slsa) builder(c *cursor) {
	c.object(func(key []byte) {
		if string(key) == "id" {
			s.p.BuilderID = c.text(maxText)
		}
	})
}

func (s *slsa) required(c *cursor) {
	if c.err == nil && s.p.BuilderID == "" {
		c.fail("builder.id is missing")
	}
	if c.err == nil && s.p.BuildType == "" {
		c.fail("buildType is missing")
	}
}

func (s *slsa) dependency(c *cursor) {
	var d dependency
	var uri string
	c.object(func(key []byte) {
		switch string(key) {
		case "name":
			d.name = c.text(maxText)
		case "uri":
			uri = c.text(maxText)
		case "digest":
			d.commit, d.git = commitOf(c)
		}
	})
	d.uri, d.git = uri, d.commit != "" && (d.git || isGit(uri))
	s.deps = append(s.deps, d)
	if len(s.deps) > MaxFindings {
		c.fail("%w: more than %d dependencies", ErrTooLarge, MaxFindings)
	}
}

// isGit says that a dependency is a repository and not a file, an image or a package.
func isGit(uri string) bool {
	bare, _ := splitSource(uri)
	return strings.HasPrefix(uri, "git+") || strings.HasPrefix(uri, "git://") || strings.HasSuffix(bare, ".git")
}

var commitRE = regexp.MustCompile(`^(?:[0-9a-f]{40}|[0-9a-f]{64})$`)

// commitOf reads a digest set and answers the revision in it, and whether the set itself says that it
// is one. GitLab's runner calls it sha256.
func commitOf(c *cursor) (commit string, git bool) {
	byKey := map[string]string{}
	c.object(func(key []byte) {
		if v, ok := c.scalar(maxWord); ok {
			byKey[clean(string(key), maxWord)] = strings.ToLower(v)
		}
	})
	commit = cmp.Or(byKey["gitCommit"], byKey["sha1"])
	if commit == "" && len(byKey["sha256"]) == 40 {
		commit = byKey["sha256"]
	}
	if !commitRE.MatchString(commit) {
		return "", false
	}
	return commit, byKey["gitCommit"] != ""
}

var credentialsRE = regexp.MustCompile(`://[^/@\s]*@`)

// withoutCredentials takes the user and the password out of URLs.
func withoutCredentials(s string) string { return credentialsRE.ReplaceAllString(s, "://") }

// splitSource takes a source apart into where it is and which branch or tag: git+https://host/repo@ref,
// or BuildKit's https://host/repo.git#ref:folder. Credentials are left out.
func splitSource(uri string) (repo, ref string) {
	repo = withoutCredentials(strings.TrimPrefix(uri, "git+"))
	repo, fragment, _ := strings.Cut(repo, "#")
	ref, _, _ = strings.Cut(fragment, ":")
	scheme, rest, ok := strings.Cut(repo, "://")
	if !ok {
		return repo, ref
	}
	host, path, hasPath := strings.Cut(rest, "/")
	if p, r, ok := strings.Cut(path, "@"); ok {
		path, ref = p, cmp.Or(ref, r)
	}
	repo = scheme + "://" + host
	if hasPath {
		repo += "/" + path
	}
	return repo, ref
}

// source sets what was built, and its revision from the dependency on the same repository.
func (s *slsa) source(uri string) {
	if uri == "" {
		return
	}
	repo, ref := splitSource(uri)
	s.p.SourceURI, s.p.Ref = repo, ref
	commits := map[string]bool{}
	for _, d := range s.deps {
		if r, _ := splitSource(d.uri); r == repo && d.commit != "" {
			commits[d.commit] = true
			s.p.SourceCommit = d.commit
		}
	}
	if len(commits) > 1 { // the same repository twice, at different revisions: which one was built?
		s.p.SourceCommit = ""
	}
}

// commit sets the revision that was stated beside the source itself.
func (s *slsa) commit(commit string) {
	if commitRE.MatchString(commit) {
		s.p.SourceCommit = commit
	}
}

// onlyGit takes the source from the dependencies, of those with one of the names if there are any,
// provided that they all mean one repository at one revision. Of several it takes none.
func (s *slsa) onlyGit(names ...string) {
	pick := slices.DeleteFunc(slices.Clone(s.deps), func(d dependency) bool { return !d.git })
	if named := slices.DeleteFunc(slices.Clone(pick), func(d dependency) bool {
		return !slices.ContainsFunc(names, func(n string) bool { return strings.HasPrefix(d.name, n) })
	}); len(named) > 0 {
		pick = named
	}
	var repo, ref, commit string
	for i, d := range pick {
		r, f := splitSource(d.uri)
		if i > 0 && (r != repo || d.commit != commit) {
			return
		}
		repo, ref, commit = r, f, d.commit
	}
	s.p.SourceURI, s.p.Ref, s.p.SourceCommit = repo, ref, commit
}

func (s *slsa) finish(d *Document) {
	if len(s.fields) > 0 {
		s.p.Fields = s.fields
	}
	d.Provenance = s.p
}
